// Strokes in ComfyUI's Painter change no value of the graph until it is run, so Run (On Change) does not see them.
// When one ends, or the sheet is cleared, say that the graph has changed: the frontend then runs it if that mode is on,
// and else does nothing. Graphs without a node of this pack are left alone.

import { app } from "../../scripts/app.js"

function isPainter(target) {
    const id = target.closest?.("[data-node-id]")?.dataset.nodeId
    const graph = app.canvas?.graph ?? app.graph
    const ours = graph?.nodes.some(node => node.type.startsWith("SanaSprint"))
    return ours && id !== undefined && graph.getNodeById(id)?.type === "Painter"
}

function changed() {
    // after the node's own listener has ended the stroke
    requestAnimationFrame(() => app.api.dispatchCustomEvent?.("graphChanged", app.graph.serialize()))
}

app.registerExtension({
    name: "SanaSprint.Sketch",
    setup() {
        const ended = event => event.target.tagName === "CANVAS" && isPainter(event.target) && changed()
        addEventListener("pointerup", event => event.button === 0 && ended(event), true)
        addEventListener("pointercancel", ended, true)
        addEventListener("click", event => event.target.closest?.("button") && isPainter(event.target) && changed(), true)
    },
})
