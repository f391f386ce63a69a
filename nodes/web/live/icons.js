// Icons of the toolbar, drawn on 16 x 16 with lines of the text's colour.

const PATHS = {
    brush: "M2 14c2 0 4-1 4-3l7-8-8 7c-2 0-3 2-3 4z",
    eraser: "M6 13 2.5 9.5 9 3l4.5 4.5L8 13zM5 7l4.5 4.5M6 13h8",
    undo: "M6 3 3 6l3 3M3 6h6a4 4 0 0 1 0 8H6",
    redo: "M10 3l3 3-3 3M13 6H7a4 4 0 0 0 0 8h3",
    clear: "M3 4h10M6 4V2h4v2M4.5 4l.7 10h5.6l.7-10M7 7v4.500M9 7v4.500",
    underlay: "M2 3h12v10H2zM2 11l4-4 3 3 2-2 3 3M10.500 6h.1",
    remove: "M4 4l8 8M12 4l-8 8",
    dice: "M3 3h10v10H3zM6 6h.1M10 6h.1M8 8h.1M6 10h.1M10 10h.1",
    lock: "M4 7h8v7H4zM6 7V5a2 2 0 0 1 4 0v2",
    view: "M2 3h12v10H2zM8 3v10",
    run: "M5 3l8 5-8 5z",
    stop: "M4 4h8v8H4z",
}

export function icon(name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg")
    svg.setAttribute("viewBox", "0 0 16 16")
    svg.setAttribute("aria-hidden", "true")
    const path = document.createElementNS(svg.namespaceURI, "path")
    path.setAttribute("d", PATHS[name])
    svg.append(path)
    return svg
}
