// The canvas in the user's language: locales/<language>/main.json, which ComfyUI hands out with everyone's.

import { api } from "../../../scripts/api.js"
import { app } from "../../../scripts/app.js"

const NAME = "sanaSprintCanvas"
let loaded = null

async function load() {
    const reply = await api.fetchApi("/i18n")
    const languages = reply.ok ? await reply.json() : {}
    const language = app.ui.settings.getSettingValue("Comfy.Locale") ?? "en"
    return { ...languages.en?.[NAME], ...languages[language]?.[NAME] }
}

/** key -> text, once for the page. */
export async function texts() {
    loaded ??= load().catch(() => ({}))
    const known = await loaded
    return (key, values = {}) => (known[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "")
}
