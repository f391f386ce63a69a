// Strokes to pixels. Each layer is a transparent sheet of its own; the lines are white on black for the ControlNet, the
// paint lies on the ground and the underlay. Only new pieces of a stroke are drawn while it grows.

const LONGER_SIDE = 512 // of the sheet on the page, at least

// In memory, not on the graphics card: frames are read back all the time.
function sheet() {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    return canvas.getContext("2d", { willReadFrequently: true })
}

/** Pieces of a stroke from point `from` on: round, with the width of its points' pressure. */
export function drawStroke(pen, stroke, [sx, sy], from = 0) {
    const { points, width } = stroke
    const last = points.length / 3 - 1
    const at = i => [points[3 * i] * sx, points[3 * i + 1] * sy, (points[3 * i + 2] * width * Math.min(sx, sy)) / 2]
    pen.globalCompositeOperation = stroke.tool === "eraser" ? "destination-out" : "source-over"
    pen.fillStyle = stroke.layer === "paint" ? stroke.color : "#ffffff"
    const dot = ([x, y, r]) => {
        pen.beginPath()
        pen.arc(x, y, Math.max(0.25, r), 0, 2 * Math.PI)
        pen.fill()
    }
    if (from === 0) dot(at(0))
    for (let i = Math.max(1, from); i <= last; i++) {
        const [a, b] = [at(i - 1), at(i)]
        const length = Math.hypot(b[0] - a[0], b[1] - a[1])
        if (length > 0) {
            const [nx, ny] = [(a[1] - b[1]) / length, (b[0] - a[0]) / length]
            pen.beginPath()
            pen.moveTo(a[0] + nx * a[2], a[1] + ny * a[2])
            pen.lineTo(b[0] + nx * b[2], b[1] + ny * b[2])
            pen.lineTo(b[0] - nx * b[2], b[1] - ny * b[2])
            pen.lineTo(a[0] - nx * a[2], a[1] - ny * a[2])
            pen.fill()
        }
        dot(b)
    }
    pen.globalCompositeOperation = "source-over"
}

/** Give a canvas a size, which clears it; false if it had that size. */
function fit(canvas, width, height) {
    if (canvas.width === width && canvas.height === height) return false
    Object.assign(canvas, { width, height })
    return true
}

/** All pixels of a canvas, the empty ones too, on another of its size. */
function copy(canvas, pen) {
    fit(pen.canvas, canvas.width, canvas.height)
    pen.globalCompositeOperation = "copy"
    pen.drawImage(canvas, 0, 0)
    pen.globalCompositeOperation = "source-over"
}

function cover(pen, image, width, height) {
    const [w, h] = [image.naturalWidth ?? image.width, image.naturalHeight ?? image.height]
    const scale = Math.max(width / w, height / h)
    pen.drawImage(image, (width - w * scale) / 2, (height - h * scale) / 2, w * scale, h * scale)
}

/** The sheet as pixels: `show` draws it for eyes, `frame` gives what the networks get. */
export class Raster {
    constructor() {
        this.layers = { lines: sheet(), paint: sheet() }
        this.kept = { lines: sheet(), paint: sheet(), strokes: [] } // both layers with these strokes
        this.small = sheet()
        this.underlay = null // an image, once it is there
        this.drawing = null
    }

    get size() {
        const { width, height } = this.layers.lines.canvas
        return [width, height]
    }

    /** All of a drawing, at the pixels that the model asks for; anew, but for strokes that it had before. */
    render(drawing, longer = LONGER_SIDE) {
        this.drawing = drawing
        const { kept, layers } = this
        const scale = Math.max(LONGER_SIDE, longer) / Math.max(...drawing.size)
        const size = drawing.size.map(x => Math.max(1, Math.round(x * scale)))
        const same = size.every((x, i) => x === this.size[i]) && kept.strokes.every((s, i) => s === drawing.strokes[i])
        for (const [name, layer] of Object.entries(layers)) {
            if (same) copy(kept[name].canvas, layer)
            else fit(layer.canvas, ...size) || layer.clearRect(0, 0, ...size)
        }
        for (const stroke of drawing.strokes.slice(same ? kept.strokes.length : 0)) this.extend(stroke, 0)
        for (const [name, layer] of Object.entries(layers)) copy(layer.canvas, kept[name])
        kept.strokes = drawing.strokes
    }

    extend(stroke, from) {
        const scale = this.size.map((x, i) => x / this.drawing.size[i])
        drawStroke(this.layers[stroke.layer], stroke, scale, from)
    }

    paintSheet(pen, width, height) {
        pen.fillStyle = this.drawing.ground
        pen.fillRect(0, 0, width, height)
        this.drawUnderlay(pen, width, height)
        pen.drawImage(this.layers.paint.canvas, 0, 0, width, height)
    }

    drawUnderlay(pen, width, height) {
        if (!this.underlay) return
        pen.globalAlpha = this.drawing.underlay?.opacity ?? 1
        cover(pen, this.underlay, width, height)
        pen.globalAlpha = 1
    }

    /**
     * On the canvas that is drawn on; `film`: as what lies over the picture, lines without their paper. On paint, lines
     * invert what they lie on, and so can be seen on any colour.
     */
    show(target, mode, film) {
        const [width, height] = this.size
        fit(target, width, height)
        const pen = target.getContext("2d")
        if (mode === "lines") {
            pen.fillStyle = "#000000"
            if (film) pen.clearRect(0, 0, width, height)
            else pen.fillRect(0, 0, width, height)
            this.drawUnderlay(pen, width, height)
        } else this.paintSheet(pen, width, height)
        if (mode === "paint") return
        pen.globalCompositeOperation = mode === "both" ? "difference" : "source-over"
        pen.drawImage(this.layers.lines.canvas, 0, 0)
        pen.globalCompositeOperation = "source-over"
    }

    /** Pixels at the model's size, by mode: grey lines [h, w], then the RGB sheet [h, w, 3]. */
    frame(width, height, mode) {
        const pen = this.small
        fit(pen.canvas, width, height)
        pen.imageSmoothingQuality = "high"
        const count = width * height
        const pixels = new Uint8Array(count * ({ lines: 1, paint: 3 }[mode] ?? 4))
        let end = 0
        if (mode !== "paint") {
            pen.fillStyle = "#000000"
            pen.fillRect(0, 0, width, height)
            pen.drawImage(this.layers.lines.canvas, 0, 0, width, height)
            const { data } = pen.getImageData(0, 0, width, height)
            for (let i = 0; i < count; i++) pixels[i] = data[4 * i]
            end = count
        }
        if (mode !== "lines") {
            this.paintSheet(pen, width, height)
            const { data } = pen.getImageData(0, 0, width, height)
            for (let i = 0, to = end; i < count; i++, to += 3) {
                pixels[to] = data[4 * i]
                pixels[to + 1] = data[4 * i + 1]
                pixels[to + 2] = data[4 * i + 2]
            }
        }
        return pixels
    }
}
