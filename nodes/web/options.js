// The choices of this pack's combos in the user's language. The frontend translates names and tooltips of a custom node,
// not what its combos offer; a combo's label function changes what is shown, in both renderers, and not its value.

import { app } from "../../scripts/app.js"

const PREFIX = "SanaSprint"
let words = {} // language -> choice -> what is shown, from locales/*/main.json

function label(value) {
    const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"
    return words[language]?.[value] ?? value ?? ""
}

app.registerExtension({
    name: "SanaSprint.Options",
    async init() {
        const languages = await (await app.api.fetchApi("/i18n")).json()
        for (const [language, texts] of Object.entries(languages)) words[language] = texts.sanaSprint?.options
    },
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith(PREFIX)) return
        for (const widget of node.widgets ?? []) if (widget.type === "combo") widget.options.getOptionLabel ??= label
    },
})
