// Graphs saved with version 0.1 list the values of inputs that now come only with a choice: angles after every schedule,
// for one. Before ComfyUI reads such a node, put its values into today's order, and its links onto today's inputs.

import { app } from "../../scripts/app.js"

const FORMATS = ["authors", "diffusers"]

function schedule(values) {
    const [choice, denoise, angles] = values.slice(-3)
    if (typeof angles !== "string") return values
    return [...values.slice(0, -3), choice, ...(choice === "custom" ? [angles] : []), denoise]
}

function size(values, offered) {
    const [choice, , , batch] = values
    if (choice === "custom") return values
    const today = offered.find(({ key }) => key === choice || key.endsWith(`, ${choice}`))?.key ?? choice
    return [today, batch ?? values[1]]
}

function instruction(values) {
    const [text, choice, format, own, ...others] = values
    const today = choice === "custom" && FORMATS.includes(own)
    if (today || !FORMATS.includes(format) || typeof own !== "string") return values
    return [text, choice, ...(choice === "custom" ? [own] : []), format, ...others]
}

// For each node: its dynamic combo and its place among the values, what had been inputs of the node itself, and its
// values as they are listed today.
const CHANGED = {
    SanaSprintSchedule: { combo: "schedule", at: 1, own: ["angles"], today: schedule },
    SanaSprintSampler: { combo: "schedule", at: 4, own: ["angles"], today: schedule },
    SanaSprintEmptyLatent: { combo: "size", at: 0, own: ["width", "height"], today: size },
    SanaSprintTextEncode: { combo: "instruction", at: 1, own: ["custom_instruction"], today: instruction },
}

function inputsToday(inputs, { combo, at, own }, values) {
    const custom = values[at] === "custom"
    return inputs
        ?.filter(input => !own.includes(input.name) || input.link != null)
        .map(input => {
            if (!custom || !own.includes(input.name)) return input
            const name = `${combo}.${input.name}`
            return { ...input, name, widget: { name } }
        })
}

app.registerExtension({
    name: "SanaSprint.Older",
    beforeRegisterNodeDef(nodeType, nodeData) {
        const changed = CHANGED[nodeData.name]
        if (!changed) return
        const configure = nodeType.prototype.configure
        nodeType.prototype.configure = function (data) {
            if (!Array.isArray(data.widgets_values)) return configure.call(this, data)
            const offered = nodeData.input.required[changed.combo][1].options
            const widgets_values = changed.today(data.widgets_values, offered)
            const inputs = inputsToday(data.inputs, changed, widgets_values)
            return configure.call(this, { ...data, widgets_values, inputs })
        }
    },
})
