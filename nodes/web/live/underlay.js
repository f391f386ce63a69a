// An image under the drawing. It goes into ComfyUI's input folder, and the drawing remembers its name alone.

import { api } from "../../../scripts/api.js"

const FOLDER = "sana_sprint"

/** A file into input/; the reference that the drawing holds. Raises Error with ComfyUI's answer. */
export async function upload(file) {
    const body = new FormData()
    body.append("image", file, file.name || "underlay.png")
    body.append("subfolder", FOLDER)
    const reply = await api.fetchApi("/upload/image", { method: "POST", body })
    if (reply.status !== 200) throw new Error(`${reply.status} ${reply.statusText}`)
    const { name, subfolder, type } = await reply.json()
    return { name, subfolder: subfolder ?? "", type: type ?? "input" }
}

/** The image of a reference. Raises if it is no longer there. */
export async function load({ name, subfolder, type }) {
    const image = new Image()
    image.src = api.apiURL(`/view?${new URLSearchParams({ filename: name, subfolder, type })}`)
    await image.decode()
    return image
}

const imageOf = files => Array.from(files ?? []).find(file => file.type.startsWith("image/"))

/** take(file) for each image that is dropped or pasted into the element; ComfyUI does not see it. */
export function listenToFiles(root, take) {
    const carriesFiles = event => event.dataTransfer?.types.includes("Files")
    for (const name of ["dragenter", "dragover"]) {
        root.addEventListener(name, event => {
            if (!carriesFiles(event)) return
            event.preventDefault()
            event.stopPropagation()
        })
    }
    const taken = files => event => {
        const file = imageOf(files(event))
        if (!file) return
        event.preventDefault()
        event.stopPropagation()
        take(file)
    }
    root.addEventListener("drop", taken(event => event.dataTransfer?.files))
    root.addEventListener("paste", taken(event => event.clipboardData?.files))
}
