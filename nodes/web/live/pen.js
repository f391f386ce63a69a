// Mouse, pen, finger and arrow keys as strokes.

import { mirrored, simplify } from "./strokes.js"

const STEP = 8 // pixels of the drawing that an arrow key goes; with Shift one
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
const ERASER = 5 // the button that a pen's other end is (W3C, Pointer Events)
const tenth = x => Math.round(x * 10) / 10

export class Pen {
    /**
     * sheet: the canvas that is drawn on; tool: () => {layer, tool, color, width, symmetry}; size: () => [w, h] of the
     * drawing; on: extend(strokes, from) while drawing, end(strokes), cancel(), cursor() when the keys' cursor moves.
     */
    constructor(sheet, tool, size, on) {
        Object.assign(this, { sheet, tool, size, on })
        this.strokes = null // the one that grows, and its mirror images
        this.pointer = null
        this.cursor = null // of the arrow keys
        sheet.addEventListener("pointerdown", event => this.press(event))
        sheet.addEventListener("pointermove", event => this.move(event))
        sheet.addEventListener("pointerup", event => this.release(event))
        sheet.addEventListener("pointercancel", event => this.release(event))
        sheet.addEventListener("blur", () => this.hideCursor())
    }

    get down() {
        return this.strokes !== null
    }

    /** x, y, pressure of an event, in pixels of the drawing. */
    at(event) {
        const box = this.sheet.getBoundingClientRect()
        const [width, height] = this.size()
        const x = ((event.clientX - box.left) / box.width) * width
        const y = ((event.clientY - box.top) / box.height) * height
        const pressure = event.pointerType === "pen" ? Math.max(0.05, event.pressure) : 1
        return [tenth(x), tenth(y), Math.round(pressure * 100) / 100]
    }

    press(event) {
        const rubber = event.pointerType === "pen" && event.button === ERASER
        if ((event.button !== 0 && !rubber) || this.down) return
        event.stopPropagation()
        this.sheet.focus({ preventScroll: true })
        this.sheet.setPointerCapture(event.pointerId)
        this.pointer = event.pointerId
        this.hideCursor()
        this.begin(this.at(event), rubber)
    }

    move(event) {
        if (event.pointerId !== this.pointer) return
        event.stopPropagation()
        const events = event.getCoalescedEvents?.() ?? []
        this.grow((events.length ? events : [event]).flatMap(each => this.at(each)))
    }

    release(event) {
        if (event.pointerId !== this.pointer) return
        event.stopPropagation()
        this.pointer = null
        this.finish()
    }

    begin(point, rubber = false) {
        const { symmetry, ...tool } = this.tool()
        if (rubber) tool.tool = "eraser"
        this.strokes = mirrored(point, this.size(), symmetry).map(points => ({ ...tool, points }))
        this.symmetry = symmetry
        this.on.extend(this.strokes, 0)
    }

    grow(points) {
        const from = this.strokes[0].points.length / 3
        mirrored(points, this.size(), this.symmetry).forEach((more, i) => this.strokes[i].points.push(...more))
        this.on.extend(this.strokes, from)
    }

    finish() {
        const strokes = this.strokes.map(stroke => ({ ...stroke, points: simplify(stroke.points, stroke.width) }))
        this.strokes = null
        this.on.end(strokes)
    }

    cancel() {
        if (!this.down) return
        this.strokes = this.pointer = null
        this.on.cancel()
    }

    hideCursor() {
        if (this.down && this.pointer === null) this.finish()
        if (!this.cursor) return
        this.cursor = null
        this.on.cursor()
    }

    /** Arrow keys move a cursor, the space bar lowers the pen and lifts it. True if the key was one of them. */
    key(event) {
        const [width, height] = this.size()
        const arrow = ARROWS[event.key]
        if (this.pointer !== null || (!arrow && event.key !== " ")) return false
        const [x, y] = this.cursor ?? [Math.round(width / 2), Math.round(height / 2)]
        const step = event.shiftKey ? 1 : STEP
        const inside = (v, d, most) => Math.min(most, Math.max(0, v + d * step))
        this.cursor = arrow ? [inside(x, arrow[0], width), inside(y, arrow[1], height)] : [x, y]
        if (arrow && this.down) this.grow([...this.cursor, 1])
        if (!arrow && this.down) this.finish()
        else if (!arrow) this.begin([...this.cursor, 1])
        this.on.cursor()
        return true
    }
}
