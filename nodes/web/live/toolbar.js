// The rows of controls above the sheet. `tool` is what the pen asks for; all else is told to `act`.

import { icon } from "./icons.js"

export const WIDTHS = { least: 1, most: 96 } // of the brush, in pixels of the drawing

export function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag)
    for (const [name, value] of Object.entries(attributes)) {
        if (name in made && name !== "list") made[name] = value
        else made.setAttribute(name, value)
    }
    made.append(...children)
    return made
}

/** Every label below a root in the user's language; `data-text` holds its key. */
export function label(root, text) {
    for (const each of root.querySelectorAll("[data-text]")) {
        const words = text(each.dataset.text)
        if (each.tagName === "OPTION") each.textContent = words
        else {
            each.setAttribute("aria-label", words)
            each.title = words
        }
    }
}

const button = (key, act) => element("button", { type: "button", "data-text": key, onclick: act }, icon(key))
const slider = (key, min, max, step, value, act) =>
    element("input", { type: "range", min, max, step, value, "data-text": key, oninput: e => act(+e.target.value) })
const colour = (key, value, act) =>
    element("input", { type: "color", value, "data-text": key, oninput: e => act(e.target.value) })

function choice(key, values, act) {
    const options = values.map(value => element("option", { value, "data-text": `${key}_${value || "off"}` }))
    return element("select", { "data-text": key, onchange: e => act(e.target.value) }, ...options)
}

export class Toolbar {
    /**
     * act: an object of functions: undo, redo, clear, ground(colour), groundSet(), underlayFile(file), underlayRemove(),
     * underlayOpacity(x), dice(), lock(), view(), sheetOpacity(x), toolChanged().
     */
    constructor(act) {
        this.act = act
        this.tool = { layer: "lines", tool: "brush", color: "#d03020", width: 12, symmetry: "" }
        const set = values => {
            Object.assign(this.tool, values)
            this.show()
            act.toolChanged()
        }
        this.brush = button("brush", () => set({ tool: "brush" }))
        this.eraser = button("eraser", () => set({ tool: "eraser" }))
        this.width = slider("size", WIDTHS.least, WIDTHS.most, 1, this.tool.width, width => set({ width }))
        this.colour = colour("colour", this.tool.color, color => set({ color, tool: "brush" }))
        this.symmetry = choice("symmetry", ["", "x", "y", "xy"], symmetry => set({ symmetry }))
        this.layer = choice("layer", ["lines", "paint"], layer => set({ layer }))
        this.undo = button("undo", act.undo)
        this.redo = button("redo", act.redo)
        this.clear = button("clear", act.clear)
        this.ground = colour("ground", "#ffffff", act.ground)
        this.ground.onchange = act.groundSet
        this.file = element("input", { type: "file", accept: "image/*", hidden: true })
        this.file.onchange = () => {
            if (this.file.files.length) act.underlayFile(this.file.files[0])
            this.file.value = ""
        }
        this.underlay = button("underlay", () => this.file.click())
        this.opacity = slider("underlay_opacity", 0, 1, 0.05, 1, act.underlayOpacity)
        this.remove = button("remove", act.underlayRemove)
        this.dice = button("dice", act.dice)
        this.lock = button("lock", act.lock)
        this.view = button("view", act.view)
        this.sheetOpacity = slider("sheet_opacity", 0, 1, 0.05, 0.3, act.sheetOpacity)
        this.element = element("div", { className: "tools", role: "toolbar", "data-text": "tools" },
            this.group(this.brush, this.eraser, this.width, this.colour, this.symmetry, this.layer),
            this.group(this.undo, this.redo, this.clear),
            this.group(this.underlay, this.opacity, this.remove, this.ground, this.file),
            this.group(this.dice, this.lock, this.view, this.sheetOpacity),
        )
        this.show()
    }

    group(...controls) {
        return element("span", {}, ...controls)
    }

    /** run("brush" | "eraser" | "smaller" | "larger"), from a key. */
    run(command) {
        if (command === "brush" || command === "eraser") this[command].click()
        else {
            const step = Math.max(1, Math.round(this.tool.width * 0.15))
            this.width.value = this.tool.width + (command === "larger" ? step : -step)
            this.width.oninput({ target: this.width })
        }
    }

    /** What can be used now: the node's mode, the drawing and its past, and how it is looked at. */
    update({ mode, history, underlay, locked, single }) {
        if (mode !== "both") this.tool.layer = mode
        this.layer.hidden = mode !== "both"
        this.ground.hidden = mode === "lines"
        this.ground.value = history.now.ground
        this.undo.disabled = !history.past.length
        this.redo.disabled = !history.future.length
        this.clear.disabled = !history.now.strokes.length
        this.opacity.hidden = this.remove.hidden = !underlay
        this.opacity.value = history.now.underlay?.opacity ?? 1
        this.remove.disabled = !history.now.underlay?.name
        this.lock.setAttribute("aria-pressed", locked)
        this.view.setAttribute("aria-pressed", single)
        this.sheetOpacity.hidden = !single
        this.show()
    }

    show() {
        const { tool, layer, width } = this.tool
        this.brush.setAttribute("aria-pressed", tool === "brush")
        this.eraser.setAttribute("aria-pressed", tool === "eraser")
        this.colour.hidden = layer !== "paint"
        this.layer.value = layer
        this.width.setAttribute("aria-valuetext", `${width} px`)
    }
}
