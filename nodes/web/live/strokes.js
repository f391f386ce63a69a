// A drawing as vectors: what the widget's value holds, and what can be undone. Points are x, y, pressure in pixels of
// the drawing's size, whose longer side has SIDE of them; the server rasterises the same numbers.

export const SIDE = 512
const HISTORY = 100
const TOLERANCE = 0.4 // pixels by which a point may lie off the line that stands for it
const COLOUR = /^#[0-9a-f]{6}$/i

export const emptyDrawing = () => ({ version: 1, size: [SIDE, SIDE], ground: "#ffffff", underlay: null, strokes: [] })

/** [w, h] with the longer side at SIDE. */
export function sheetSize(width, height) {
    const scale = SIDE / Math.max(width, height)
    return [Math.round(width * scale), Math.round(height * scale)]
}

const finite = numbers => Array.isArray(numbers) && numbers.every(Number.isFinite)

function strokeOf(stroke) {
    const points = finite(stroke?.points) && stroke.points.length >= 3 && stroke.points.length % 3 === 0
    if (!points || !(stroke.width > 0)) return null
    return {
        layer: stroke.layer === "paint" ? "paint" : "lines",
        tool: stroke.tool === "eraser" ? "eraser" : "brush",
        color: COLOUR.test(stroke.color) ? stroke.color : "#ffffff",
        width: stroke.width,
        points: stroke.points,
    }
}

function underlayOf(underlay) {
    if (typeof underlay?.name !== "string") return null
    const opacity = Number.isFinite(underlay.opacity) ? Math.min(1, Math.max(0, underlay.opacity)) : 1
    return { name: underlay.name, subfolder: String(underlay.subfolder ?? ""), type: String(underlay.type ?? "input"), opacity }
}

/** The drawing that a widget's value says; what cannot be read is left out. */
export function parseDrawing(text) {
    let saved = {}
    try {
        saved = JSON.parse(text || "{}") ?? {}
    } catch {}
    const drawing = emptyDrawing()
    if (finite(saved.size) && saved.size.length === 2 && Math.min(...saved.size) > 0) drawing.size = saved.size
    if (COLOUR.test(saved.ground)) drawing.ground = saved.ground
    drawing.underlay = underlayOf(saved.underlay)
    drawing.strokes = (Array.isArray(saved.strokes) ? saved.strokes : []).map(strokeOf).filter(Boolean)
    return drawing
}

/** Fewer points for the same line: those that the straight line between their neighbours does not need. */
export function simplify(points, width) {
    const at = i => [points[3 * i], points[3 * i + 1], (points[3 * i + 2] * width) / 2]
    const count = points.length / 3
    const keep = new Set([0, count - 1])
    const spans = [[0, count - 1]]
    while (spans.length) {
        const [first, last] = spans.pop()
        const [start, end] = [at(first), at(last)]
        const way = end.map((x, k) => x - start[k])
        const length = way.reduce((sum, x) => sum + x * x, 0)
        let far = 0
        let middle = -1
        for (let i = first + 1; i < last; i++) {
            const off = at(i).map((x, k) => x - start[k])
            const along = length ? Math.min(1, Math.max(0, off.reduce((sum, x, k) => sum + x * way[k], 0) / length)) : 0
            const distance = Math.hypot(...off.map((x, k) => x - along * way[k]))
            if (distance > far) [far, middle] = [distance, i]
        }
        if (far <= TOLERANCE) continue
        keep.add(middle)
        spans.push([first, middle], [middle, last])
    }
    return [...keep].sort((a, b) => a - b).flatMap(i => points.slice(3 * i, 3 * i + 3))
}

/** The same points on the other side of the sheet's middle: "x" left and right, "y" above and below, "xy" both. */
export function mirrored(points, [width, height], symmetry) {
    const flip = (x, y) => points.map((v, i) => (i % 3 === 0 && x ? width - v : i % 3 === 1 && y ? height - v : v))
    const flips = { "": [], x: [[1, 0]], y: [[0, 1]], xy: [[1, 0], [0, 1], [1, 1]] }
    return [points, ...(flips[symmetry] ?? []).map(([x, y]) => flip(x, y))]
}

/** A drawing with its past: states are never changed, only replaced. */
export class History {
    constructor() {
        this.replace(emptyDrawing())
    }

    replace(drawing) {
        this.now = drawing
        this.past = []
        this.future = []
    }

    change(difference) {
        this.past.push(this.now)
        if (this.past.length > HISTORY) this.past.shift()
        this.future = []
        this.now = { ...this.now, ...difference }
    }

    /** Without a step to undo: a slider that moves. */
    adjust(difference) {
        this.now = { ...this.now, ...difference }
    }

    undo() {
        return this.step(this.past, this.future)
    }

    redo() {
        return this.step(this.future, this.past)
    }

    step(from, to) {
        if (!from.length) return false
        to.push(this.now)
        this.now = from.pop()
        return true
    }

    add(strokes) {
        this.change({ strokes: [...this.now.strokes, ...strokes] })
    }

    /** Another shape of the sheet: what is drawn keeps its shape and its middle. The past has the old one and ends. */
    resize(size) {
        const [width, height] = this.now.size
        if (Math.abs(width / height - size[0] / size[1]) < 0.01) return false
        const scale = Math.min(size[0] / width, size[1] / height)
        const [left, top] = [(size[0] - width * scale) / 2, (size[1] - height * scale) / 2]
        const tenth = x => Math.round(x * 10) / 10
        const moved = points =>
            points.map((v, i) => (i % 3 === 2 ? v : tenth(v * scale + (i % 3 === 0 ? left : top))))
        const strokes = this.now.strokes.map(s => ({ ...s, width: tenth(s.width * scale), points: moved(s.points) }))
        this.replace({ ...this.now, size, strokes })
        return true
    }
}
