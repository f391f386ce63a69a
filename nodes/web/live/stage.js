// The two sheets side by side, or the drawing as a film over the picture; what goes on, in words and milliseconds.

import { icon } from "./icons.js"
import { element } from "./toolbar.js"

export class Stage {
    /** press: what the button of the state does, by the state's name. */
    constructor(press) {
        this.drawing = element("canvas", { tabIndex: 0, role: "application", className: "drawing", "data-text": "sheet" })
        this.cursor = element("div", { className: "cursor", hidden: true })
        this.picture = element("canvas", { role: "img", className: "picture", "data-text": "picture" })
        this.milliseconds = element("output", { className: "ms" })
        this.words = element("span", { role: "status", className: "words" })
        this.button = element("button", { type: "button", className: "go", onclick: () => press(this.state) })
        const fit = (...children) => element("div", {}, element("div", { className: "fit" }, ...children))
        this.sheets = element("div", { className: "sheets" },
            fit(this.picture, this.milliseconds), fit(this.drawing, this.cursor))
        this.element = element("div", { className: "stage" }, this.sheets,
            element("div", { className: "bar" }, element("i", { className: "light" }), this.words, this.button))
        this.text = key => key
        this.showState({ state: "connecting" })
    }

    /** size: [w, h] of the sheets; single: one above the other, the drawing with this opacity. */
    arrange(size, single, opacity) {
        this.sheets.classList.toggle("single", single)
        this.sheets.style.setProperty("--ratio", size[0] / size[1])
        this.drawing.style.opacity = single ? opacity : ""
    }

    /** bytes: a JPEG, or RGB pixels. */
    async showPicture({ width, height, format, ms }, bytes) {
        const pixels = format === "jpeg" ? new Blob([bytes], { type: "image/jpeg" }) : opaque(bytes, width, height)
        const image = await createImageBitmap(pixels)
        if (this.picture.width !== image.width || this.picture.height !== image.height) {
            Object.assign(this.picture, { width: image.width, height: image.height })
        }
        this.picture.getContext("2d").drawImage(image, 0, 0)
        image.close()
        if (ms) this.showMilliseconds(ms)
    }

    showMilliseconds(ms) {
        this.milliseconds.textContent = `${Math.round(ms.total)} ms`
        const { total, ...stages } = ms
        this.milliseconds.title = Object.entries(stages).map(([name, x]) => `${name} ${x.toFixed(0)}`).join(", ")
    }

    showState({ state, reason, message } = this.last) {
        this.last = { state, reason, message }
        this.state = state
        this.element.dataset.state = state
        const known = reason && this.text(`reason_${reason}`) !== `reason_${reason}` ? this.text(`reason_${reason}`) : reason
        const words = [this.text(`state_${state}`), known].filter(Boolean).join(": ")
        this.words.textContent = message ? `${words} · ${message}` : words
        const does = { waiting: "run", ended: "run", live: "stop", taken: "take" }[state]
        this.button.hidden = !does
        if (does) this.button.replaceChildren(icon(does === "stop" ? "stop" : "run"), this.text(`button_${does}`))
    }

    showError(message) {
        this.words.textContent = message
    }

    moveCursor(at, size, width) {
        this.cursor.hidden = !at
        if (!at) return
        this.cursor.style.left = `${(at[0] / size[0]) * 100}%`
        this.cursor.style.top = `${(at[1] / size[1]) * 100}%`
        this.cursor.style.width = `${(width / size[0]) * 100}%`
    }
}

function opaque(rgb, width, height) {
    const image = new ImageData(width, height)
    image.data.fill(255)
    for (let i = 0, from = 0; i < image.data.length; i += 4) {
        for (let k = 0; k < 3; k++) image.data[i + k] = rgb[from++]
    }
    return image
}
