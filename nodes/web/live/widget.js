// The live canvas as a widget of ComfyUI's nodes: SANA_SPRINT_CANVAS. The node's other widgets hold prompt, seed and steps.

import { api } from "../../../scripts/api.js"
import { app } from "../../../scripts/app.js"
import { LiveCanvas } from "./canvas.js"
import { texts } from "./texts.js"

const SENT = ["text", "seed", "steps", "final_steps", "guidance", "strength", "denoise"]
const VIEW = "live_canvas_view" // among the node's properties: how the canvas is looked at
const [WIDTH_PX, HEIGHT_PX] = [640, 420]
const LARGEST_SEED = 2 ** 32

const widgetOf = (node, name) => node.widgets?.find(widget => widget.name === name)
const isLinked = (node, name) => node.inputs?.some(input => input.name === name && input.link != null)

/** What ComfyUI calls a node when it runs: its id, after those of the subgraphs around it. */
function executionId(node, graph = app.rootGraph ?? app.graph) {
    for (const each of graph.nodes) {
        if (each === node) return String(node.id)
        const inside = each.subgraph && executionId(node, each.subgraph)
        if (inside) return `${each.id}:${inside}`
    }
    return null
}

function address(node) {
    const id = executionId(node)
    if (!api.clientId || id === null) return null
    const url = new URL(api.apiURL("/sana_sprint/live"), location.href)
    url.protocol = url.protocol.replace("http", "ws")
    url.search = new URLSearchParams({ client: api.clientId, node: id })
    return url
}

function setValue(node, name, value) {
    const widget = widgetOf(node, name)
    if (!widget) return
    widget.value = value
    widget.callback?.(value)
}

/** A prompt without its comments, and the first of each {choice|other}: which one is drawn by lot only when it runs. */
function settled(text) {
    const choice = /(?<!\\)\{([^{}]*)(?<!\\)\}/
    let words = text.replace(/\/\*[^]*?\*\/|\/\/.*/g, "")
    while (choice.test(words)) words = words.replace(choice, (_, inside) => inside.split("|")[0])
    return words.replace(/\\([{}])/g, "$1")
}

/** What a canvas asks of the node that it belongs to. */
function hostOf(node) {
    const value = name => widgetOf(node, name)?.value
    const sent = name => (name === "text" ? settled(String(value(name))) : value(name))
    const control = "control_after_generate"
    return {
        values: () => Object.fromEntries(SENT.filter(name => !isLinked(node, name)).map(name => [name, sent(name)])),
        mode: () => value("mode") ?? "lines",
        size: () => String(value("size") ?? "").match(/(\d+) x (\d+)/)?.slice(1).map(Number) ?? null,
        hasImage: () => isLinked(node, "image"),
        view: change => (node.properties[VIEW] = { single: false, opacity: 0.3, ...node.properties[VIEW], ...change }),
        dice: () => setValue(node, "seed", Math.floor(Math.random() * LARGEST_SEED)),
        locked: () => value(control) === "fixed",
        lock: () => setValue(node, control, value(control) === "fixed" ? "randomize" : "fixed"),
        changed() {
            const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker
            ;(tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker)
        },
        run() {
            setValue(node, "live", true)
            app.queuePrompt(0)
        },
        address: () => address(node),
    }
}

function after(node, name, act) {
    const before = node[name]
    node[name] = function (...args) {
        const answer = before?.apply(this, args)
        act()
        return answer
    }
}

// Above the sheet of the classic renderer the wheel would be lost: it zooms the graph, as beside the sheet.
function zoomGraph(event) {
    if (!event.target.closest("[data-node-id]")) app.canvas.processMouseWheel(event)
}

function addCanvas(node, name) {
    const canvas = new LiveCanvas(hostOf(node))
    const { element } = canvas
    element.addEventListener("wheel", zoomGraph, { passive: true })
    for (const type of ["pointerdown", "pointermove", "pointerup", "dblclick", "contextmenu"]) {
        element.addEventListener(type, event => event.button > 0 || event.stopPropagation())
    }
    const options = {
        getValue: () => canvas.value,
        setValue: text => (canvas.value = text),
        getMinHeight: () => HEIGHT_PX,
        hideOnZoom: false,
        hideInPanel: true, // the panel beside the graph would take the element out of the node
    }
    const widget = node.addDOMWidget(name, "SANA_SPRINT_CANVAS", element, options)
    after(node, "onAdded", () => {
        node.setSize([Math.max(node.size[0], WIDTH_PX), node.size[1]]) // one that is loaded has its own size afterwards
        canvas.open()
    })
    after(node, "onRemoved", () => canvas.close())
    texts().then(words => canvas.speak(words))
    return { widget }
}

app.registerExtension({
    name: "SanaSprint.LiveCanvas",
    init() {
        const href = new URL("./live.css", import.meta.url)
        document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }))
    },
    getCustomWidgets: () => ({ SANA_SPRINT_CANVAS: addCanvas }),
})
