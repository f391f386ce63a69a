// One live canvas: the drawing and its past, the pen, the controls, the connection, and what passes between them.

import { Connection } from "./connection.js"
import { listenToKeys } from "./keys.js"
import { Pen } from "./pen.js"
import { Raster } from "./raster.js"
import { Stage } from "./stage.js"
import { History, parseDrawing, sheetSize } from "./strokes.js"
import { Toolbar, element, label } from "./toolbar.js"
import { listenToFiles, load, upload } from "./underlay.js"

const WATCH_MS = 100 // between two looks at the node's values
const TELL_MS = 300 // after a change of the drawing

export class LiveCanvas {
    /**
     * host, the node around it: values() of its inputs, those that other nodes give left out; mode(), size() as [w, h] or
     * null, hasImage(), view(change), locked(), changed(), run(), dice(), lock(), address().
     */
    constructor(host) {
        this.host = host
        this.history = new History()
        this.raster = new Raster()
        this.model = null // [w, h] that the server asks for
        this.images = { loaded: null, given: null } // underlays: the drawing's own, and the image input's
        this.toolbar = new Toolbar(this.actions())
        this.stage = new Stage(state => this.press(state))
        this.pen = new Pen(this.stage.drawing, () => this.toolbar.tool, () => this.history.now.size, {
            extend: (strokes, from) => this.extend(strokes, from),
            end: strokes => this.commit(() => this.history.add(strokes)),
            cancel: () => this.refresh(),
            cursor: () => this.stage.moveCursor(this.pen.cursor, this.history.now.size, this.toolbar.tool.width),
        })
        this.connection = new Connection(host.address, () => this.frame(), () => !this.pen.down, {
            state: message => this.showState(message),
            answer: (header, bytes) => this.answer(header, bytes),
            error: message => this.stage.showError(message),
            busy: busy => this.stage.picture.setAttribute("aria-busy", busy),
        })
        this.element = element("div", { className: "sana-sprint-canvas" }, this.toolbar.element, this.stage.element)
        listenToKeys(this.element, this.pen, command => this.run(command))
        listenToFiles(this.element, file => this.takeUnderlay(file))
        this.refresh()
    }

    actions() {
        const adjust = change => {
            this.history.adjust(change)
            this.refresh()
            this.connection.request()
        }
        return {
            undo: () => this.run("undo"),
            redo: () => this.run("redo"),
            clear: () => this.commit(() => this.history.change({ strokes: [] })),
            ground: ground => adjust({ ground }),
            groundSet: () => this.tell(),
            underlayFile: file => this.takeUnderlay(file),
            underlayRemove: () => this.commit(() => this.history.change({ underlay: null })),
            underlayOpacity: opacity => {
                const none = { name: "", subfolder: "", type: "input" } // the image input's
                adjust({ underlay: { ...(this.history.now.underlay ?? none), opacity } })
            },
            dice: () => this.host.dice(),
            lock: () => this.host.lock(),
            view: () => this.host.view({ single: !this.host.view().single }) && this.update(),
            sheetOpacity: opacity => this.host.view({ opacity }) && this.update(),
            toolChanged: () => this.pen && this.pen.on.cursor(),
        }
    }

    run(command) {
        if (command === "undo" || command === "redo") {
            this.pen.cancel()
            this.commit(() => this.history[command]())
        } else this.toolbar.run(command)
    }

    /** The widget's value. */
    get value() {
        if (this.saved !== this.history.now) {
            this.saved = this.history.now
            this.text = JSON.stringify(this.saved)
        }
        return this.text
    }

    set value(text) {
        if (text === this.value) return
        this.history.replace(parseDrawing(text))
        this.saved = this.history.now
        this.text = typeof text === "string" ? text : "" // as it was saved, until something is drawn
        this.refresh()
        this.connection.request()
    }

    /** A change of the drawing that can be undone. */
    commit(change) {
        change()
        this.refresh()
        this.connection.request()
        this.tell()
    }

    /** ComfyUI, of what can be undone: it compares the whole graph then, for which quick strokes shall not wait. */
    tell() {
        clearTimeout(this.telling)
        this.telling = setTimeout(() => this.host.changed(), TELL_MS)
    }

    extend(strokes, from) {
        for (const stroke of strokes) this.raster.extend(stroke, from)
        this.raster.show(this.stage.drawing, this.host.mode(), this.host.view().single)
        this.connection.request()
    }

    /** All that is seen, after the drawing has changed. */
    refresh() {
        const asked = this.connection.live ? this.model : (this.host.size() ?? this.model)
        if (asked) this.history.resize(sheetSize(...asked))
        this.raster.underlay = this.underlay()
        this.raster.render(this.history.now, Math.max(...(this.model ?? [0])))
        for (const stroke of this.pen?.strokes ?? []) this.raster.extend(stroke, 0)
        this.update()
    }

    update() {
        const [mode, view, { now }] = [this.host.mode(), this.host.view(), this.history]
        this.raster.show(this.stage.drawing, mode, view.single)
        this.stage.arrange(now.size, view.single, view.opacity)
        this.toolbar.sheetOpacity.value = view.opacity
        const underlay = now.underlay?.name || this.host.hasImage()
        this.toolbar.update({ mode, history: this.history, underlay, locked: this.host.locked(), single: view.single })
    }

    // --- underlay -----------------------------------------------------------------------------------

    /** The image that lies under the drawing, loaded when its name is new. */
    underlay() {
        const { underlay } = this.history.now
        if (!underlay?.name) return this.host.hasImage() ? this.images.given : null
        const key = JSON.stringify([underlay.name, underlay.subfolder, underlay.type])
        if (this.images.key !== key) {
            this.images = { ...this.images, key, loaded: null }
            load(underlay).then(
                image => {
                    if (this.images.key !== key) return
                    this.images.loaded = image
                    this.refresh()
                    this.connection.request()
                },
                () => this.stage.showError(this.words("underlay_missing", { name: underlay.name })),
            )
        }
        return this.images.loaded
    }

    async takeUnderlay(file) {
        try {
            const opacity = this.history.now.underlay?.opacity ?? (this.host.mode() === "lines" ? 0.5 : 1)
            const underlay = { ...(await upload(file)), opacity }
            this.commit(() => this.history.change({ underlay }))
        } catch (error) {
            this.stage.showError(this.words("underlay_refused", { name: file.name, reason: error.message }))
        }
    }

    // --- live ---------------------------------------------------------------------------------------

    press(state) {
        if (state === "live") this.connection.stop()
        else if (state === "taken") this.connection.takeBack()
        else this.host.run()
    }

    frame() {
        const mode = this.host.mode()
        const [width, height] = this.model
        const { steps, final_steps, ...values } = this.host.values()
        const final = !this.pen.down
        const layers = { lines: mode !== "paint", paint: mode !== "lines" }
        const drawing = final ? this.value : undefined // the server's own pixels of it become the last picture
        const header = { width, height, ...layers, ...values, steps: final ? final_steps : steps, final, drawing }
        return [header, this.raster.frame(width, height, mode)]
    }

    /** The node's own widgets, in whatever way they are changed: by hand, from a panel beside the graph, by a script. */
    watch() {
        if (document.hidden) return
        const { host } = this
        const shape = JSON.stringify([host.mode(), host.size(), host.hasImage(), host.locked()])
        const values = JSON.stringify(host.values())
        if (shape !== this.shape) this.refresh()
        if (shape !== this.shape || values !== this.values) this.connection.request()
        Object.assign(this, { shape, values })
    }

    showState(message) {
        this.stage.showState(message)
        if (message.state !== "live") return
        this.model = [message.width, message.height]
        this.refresh()
    }

    async answer(header, bytes) {
        if (!header.underlay) return this.stage.showPicture(header, bytes)
        this.images.given = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }))
        this.refresh()
        this.connection.request()
    }

    speak(words) {
        this.words = words
        this.stage.text = words
        label(this.element, words)
        this.stage.showState()
    }

    open() {
        this.connection.open()
        this.watching = setInterval(() => this.watch(), WATCH_MS)
    }

    close() {
        clearInterval(this.watching)
        clearTimeout(this.telling)
        this.connection.close()
    }
}
