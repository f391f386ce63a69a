// Strokes in ComfyUI's Painter change no value of the graph until it is run, so Run (On Change) does not see them.
// When one ends, say that the graph has changed: the frontend then runs it if that mode is on, and else does nothing.

import { app } from "../../scripts/app.js"

function isPainter(target) {
    const id = target.closest?.("[data-node-id]")?.dataset.nodeId
    const graph = app.canvas?.graph ?? app.graph
    return target.tagName === "CANVAS" && id !== undefined && graph?.getNodeById(id)?.type === "Painter"
}

app.registerExtension({
    name: "SanaSprint.Sketch",
    setup() {
        addEventListener("pointerup", event => {
            if (event.button !== 0 || !isPainter(event.target)) return
            // after the node's own listener has ended the stroke
            requestAnimationFrame(() => app.api.dispatchCustomEvent?.("graphChanged", app.graph.serialize()))
        }, true)
    },
})
