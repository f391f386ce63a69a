// Keys of the canvas, while something in it has the focus. None of them reaches ComfyUI.

const TEXT = ["text", "number", "search"]

/** event -> what it asks for: "undo", "redo", "brush", "eraser", "smaller", "larger"; undefined for any other key. */
export function commandOf(event) {
    const key = event.key.toLowerCase()
    if ((event.ctrlKey || event.metaKey) && !event.altKey) {
        if (key === "z") return event.shiftKey ? "redo" : "undo"
        return key === "y" && !event.shiftKey ? "redo" : undefined
    }
    if (event.altKey) return undefined
    return { b: "brush", e: "eraser", "[": "smaller", "]": "larger" }[key]
}

// ComfyUI listens to keydown at the window, before any element, and looks at the event's Ctrl and Z in the frame after:
// stopping the event does not keep it from undoing the graph, so the event forgets that Ctrl was pressed.
function keepFromGraph(event) {
    for (const name of ["ctrlKey", "metaKey"]) Object.defineProperty(event, name, { value: false })
}

/** run(command) for the commands above; the pen's keys while the sheet has the focus. */
export function listenToKeys(root, pen, run) {
    root.addEventListener("keydown", event => {
        if (TEXT.includes(event.target.type)) return event.stopPropagation()
        const command = commandOf(event)
        if (command) {
            event.preventDefault()
            run(command)
        } else if (event.target === pen.sheet && pen.key(event)) event.preventDefault()
        else if (event.key === "Escape" && pen.down) pen.cancel()
        else if (event.ctrlKey || event.metaKey) return // copy, save, queue: the page's own
        event.stopPropagation()
        if (command === "undo" || command === "redo") keepFromGraph(event)
    })
}
