// The WebSocket to the node on the server: the newest frame only, and one at a time on its way, but for that of a lifted
// pen, which follows at once: the server gives up the one before. A connection that was lost comes back by itself; one
// that another tab has taken comes back when the user asks. A hidden tab sends nothing.

const RETRY_SEC = [0.5, 1, 2, 4, 8]

/** Bytes of one message: the header's length, the header as JSON, what follows it. */
export function pack(header, pixels) {
    const json = new TextEncoder().encode(JSON.stringify(header))
    const message = new Uint8Array(4 + json.length + pixels.length)
    new DataView(message.buffer).setUint32(0, json.length)
    message.set(json, 4)
    message.set(pixels, 4 + json.length)
    return message
}

export function unpack(buffer) {
    const length = new DataView(buffer).getUint32(0)
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)))
    return { header, bytes: new Uint8Array(buffer, 4 + length) }
}

export class Connection {
    /**
     * address: () => URL, or null if there is none yet; frame: () => [header, pixels] of what is drawn now;
     * final: () => whether that is of a lifted pen;
     * on: state(message), async answer(header, bytes), error(text), busy(whether the picture is older than the drawing).
     */
    constructor(address, frame, final, on) {
        Object.assign(this, { address, frame, final, on })
        this.socket = null
        this.live = false
        this.closed = true
        this.wanted = false // a frame shall go as soon as the one on its way is answered
        this.soon = false // whether that is about to be looked at
        this.flying = null // the number of the frame on its way
        this.last = false // whether that is of a lifted pen
        this.number = 0
        this.tries = 0
        this.visible = () => {
            if (document.hidden) return
            this.connect()
            this.flush()
        }
    }

    open() {
        this.closed = this.taken = false
        document.addEventListener("visibilitychange", this.visible)
        this.later(0) // the node has its place in the graph by then
    }

    later(sec) {
        clearTimeout(this.timer)
        this.timer = setTimeout(() => document.hidden || this.connect(), sec * 1000)
    }

    connect() {
        if (this.closed || this.taken || this.socket) return
        const address = this.address()
        if (!address) return this.later(RETRY_SEC[0]) // ComfyUI's own connection comes first
        const socket = (this.socket = new WebSocket(address))
        socket.binaryType = "arraybuffer"
        socket.onmessage = ({ data }) => socket === this.socket && this.receive(data)
        socket.onclose = () => socket === this.socket && this.lost()
    }

    /** After another tab took the node: this one takes it back. */
    takeBack() {
        this.taken = false
        this.socket?.close()
        this.socket = null
        this.connect()
    }

    receive(data) {
        if (typeof data !== "string") {
            const { header, bytes } = unpack(data)
            const shown = this.on.answer(header, bytes)
            if (header.seq === this.flying) this.flying = null
            this.flush()
            return shown.then(() => this.tell())
        }
        this.tries = 0 // a server that closes the line at once has said nothing
        const message = JSON.parse(data)
        if (message.type === "error") {
            if (message.seq === undefined || message.seq === this.flying) this.flying = null
            this.on.error(message.message)
            this.flush()
            return this.tell()
        }
        const goesOn = this.live && message.state === "live" // with another message
        this.live = message.state === "live"
        this.taken = message.state === "taken"
        if (!goesOn) this.flying = null
        this.on.state(message)
        if (this.live && !goesOn) this.request()
        this.tell()
    }

    lost() {
        this.live = false
        this.flying = null
        this.socket = null
        if (this.closed || this.taken) return
        this.on.state({ state: "lost" })
        this.tell()
        this.later(RETRY_SEC[Math.min(this.tries++, RETRY_SEC.length - 1)])
    }

    /** Send what is drawn, as soon as the server is free. The newest wins. */
    request() {
        if (!this.live) return
        this.on.busy(true)
        this.wanted = true
        if (!this.soon) queueMicrotask(() => this.flush()) // before the page is painted anew, which a timer waits for
        this.soon = true
    }

    tell() {
        this.on.busy(this.live && (this.wanted || this.flying !== null))
    }

    flush() {
        this.soon = false
        if (!this.wanted || !this.live || document.hidden) return
        const last = this.final()
        if (this.flying !== null && (this.last || !last)) return
        const [header, pixels] = this.frame()
        this.last = last
        this.wanted = false
        this.flying = ++this.number
        this.socket.send(pack({ seq: this.number, ...header }, pixels))
    }

    stop() {
        if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type: "stop" }))
    }

    close() {
        this.closed = true
        this.live = false
        clearTimeout(this.timer)
        document.removeEventListener("visibilitychange", this.visible)
        this.socket?.close()
        this.socket = null
    }
}
