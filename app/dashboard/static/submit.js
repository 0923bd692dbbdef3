// The form for a new job. It shows the methods with their defaults, inspects the model while the user types its name, shows
// the plan, and places the API's errors beside their fields.

import { Problem, get, post } from "./api.js";
import { fixed, h, megabytes, number, percent } from "./dom.js";

const TYPING_MS = 400;
const list = (text) => text.split(",").map((item) => item.trim()).filter(Boolean);

export function submitView({ page, signal }) {
  const inputs = {};

  /** A labelled input; `field` is what the API calls it. */
  function field(name, label, hint, input) {
    const id = `field-${name.replaceAll(".", "-")}`;
    input.id = id;
    input.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
    inputs[name] = input;
    return h("div", { class: "field", "data-field": name },
      h("label", { for: id }, label), input,
      h("p", { class: "hint", id: `${id}-hint` }, hint), h("p", { class: "error", id: `${id}-error` }));
  }
  const text = (properties = {}) => h("input", { type: "text", autocomplete: "off", spellcheck: "false", ...properties });

  const methodHint = h("span", {}, "");
  const inspection = h("section", { class: "card", "aria-live": "polite", "aria-label": "The model" }, h("p", { class: "hint" }, "Name a model to see what it is made of."));
  const planned = h("section", { "aria-live": "polite" });
  const problem = h("div", { role: "alert" });
  const method = h("select", { onchange: describe });
  const recovery = h("select", {}, h("option", { value: "" }, "the method's own"));
  const training = h("select", {}, h("option", { value: "" }, "none"));
  const shown = h("pre", { class: "code" });

  const form = h("form", { class: "columns", novalidate: true, onsubmit: submit, oninput: preview },
    h("div", {},
      h("div", { class: "card" },
        field("model_id", "Model", "A Hub id (org/name) or local:NAME.", text({ required: true, oninput: () => inspectSoon() })),
        field("revision", "Revision", "Branch, tag or commit; empty: the newest.", text({ oninput: () => inspectSoon() })),
        field("target_ratio", "Target ratio", "Share of the blocks' parameters to remove, 0.2 say; several with commas make a model each.", text({ value: "0.2", inputmode: "decimal" })),
        field("method", "Method", methodHint, method),
        field("rounds", "Rounds", "Empty: the method's default.", text({ inputmode: "numeric" }))),
      h("details", { class: "card" }, h("summary", {}, "More"),
        field("recovery.layerwise.kind", "Layer-wise recovery", "Corrects each layer as it is cut.", recovery),
        field("recovery.training.kind", "Training", "Trains the pruned model after the last round.", training),
        field("layout", "Layout", "uniform and padded load without code in the repository.", h("select", {}, ["per-layer", "uniform", "padded"].map((name) => h("option", {}, name)))),
        field("calibration.dataset", "Calibration text", "wikitext2, c4, a Hub data set or local:NAME; empty: the model's own text.", text()),
        field("evaluation.dataset", "Evaluation text", "Likewise; empty: held out of the calibration text.", text()),
        field("evaluation.zero_shot", "Zero-shot tasks", "boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa; with commas.", text()),
        field("evaluation.limit", "Examples of each task", "Empty: all.", text({ inputmode: "numeric" })),
        field("publish.repo_id", "Publish to", "org/name; empty: kept as files.", text()),
        field("labels", "Labels", "team=nlp, run=7", text()))),
    h("div", {},
      inspection, problem, planned,
      h("div", { class: "bar" },
        h("button", { type: "button", onclick: plan }, "Plan"),
        h("button", { class: "primary" }, "Submit")),
      h("details", { class: "card" }, h("summary", {}, "The request"), shown)));
  page.append(h("h1", {}, "New job"), form);

  let methods = [];
  get("/v1/methods", signal).then((known) => {
    methods = known.items;
    method.replaceChildren(...methods.map((item) => h("option", {}, item.name)));
    recovery.append(...known.kinds.layerwise_recovery.map((name) => h("option", {}, name)));
    training.append(...known.kinds.training.map((name) => h("option", {}, name)));
    describe();
    preview();
  }).catch(showProblem);

  function describe() {
    const found = methods.find((item) => item.name === method.value);
    if (!found) return;
    const gradients = found.needs_gradients ? "needs gradients" : "needs no gradients";
    methodHint.textContent = `${found.summary}. Costs ${found.passes}; ${gradients}.`;
    inputs.rounds.placeholder = String(found.default_rounds);
  }

  /** The request that the form says; what is left empty is left out. */
  function request() {
    const made = {};
    for (const [name, input] of Object.entries(inputs)) {
      const value = input.value.trim();
      if (!value || (name === "layout" && value === "per-layer")) continue;
      const path = name.split(".");
      const holder = path.slice(0, -1).reduce((inner, part) => (inner[part] ??= {}), made);
      holder[path.at(-1)] = convert(name, value);
    }
    return made;
  }

  function convert(name, value) {
    const numeric = (item) => (item !== "" && Number.isFinite(Number(item)) ? Number(item) : item);
    if (name === "target_ratio") return value.includes(",") ? list(value).map(numeric) : numeric(value);
    if (name === "rounds" || name === "evaluation.limit") return numeric(value);
    if (name === "evaluation.zero_shot") return list(value);
    if (name === "labels") return Object.fromEntries(list(value).map((pair) => pair.split(/=(.*)/s).slice(0, 2)).map(([label, content]) => [label, content ?? ""]));
    return value;
  }

  function preview() {
    shown.textContent = JSON.stringify(request(), null, 2);
  }

  let typing, asking = new AbortController();
  function inspectSoon() {
    clearTimeout(typing);
    typing = setTimeout(inspect, TYPING_MS);
  }

  async function inspect() {
    asking.abort();
    asking = new AbortController();
    const { signal: mine } = asking;
    const { model_id, revision } = request();
    if (!model_id) return;
    try {
      const found = await post("/v1/models/inspect", revision ? { model_id, revision } : { model_id }, { signal: mine });
      inspection.replaceChildren(...describeModel(found));
      showErrors([], ["model_id", "revision"]);
    } catch (error) {
      if (mine.aborted) return;
      inspection.replaceChildren(h("p", { class: "error" }, error.message));
    }
  }

  async function plan() {
    clear();
    try {
      const found = await post("/v1/jobs?validate_only=true", request(), { signal });
      planned.replaceChildren(h("div", { class: "card" }, h("h2", {}, "The plan"),
        h("ul", {}, found.targets.map((target) => h("li", {}, `ratio ${fixed(target.nearest_ratio ?? target.target_ratio, 4)}`, target.repo_id ? `, published to ${target.repo_id}` : ""))),
        h("p", { class: "hint" }, `${found.rounds} rounds of ${found.method}`, found.memory_bytes ? `; at least ${megabytes(found.memory_bytes)} of memory` : "", ". Nothing was made.")));
    } catch (error) {
      showProblem(error);
    }
  }

  async function submit(event) {
    event.preventDefault();
    clear();
    try {
      const made = await post("/v1/jobs", request(), { signal, headers: { "Idempotency-Key": crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` } });
      location.hash = `#/jobs/${made.id}`;
    } catch (error) {
      showProblem(error);
    }
  }

  function clear() {
    planned.replaceChildren();
    problem.replaceChildren();
    showErrors([], Object.keys(inputs));
  }

  function showProblem(error) {
    if (signal.aborted) return;
    const left = showErrors(error instanceof Problem ? error.errors : [], Object.keys(inputs));
    const message = error instanceof Problem ? error.message : "The service does not answer.";
    if (left.length || !error.errors?.length) problem.replaceChildren(h("p", { class: "error" }, message));
    page.querySelector("[aria-invalid=true]")?.focus();
  }

  /** Errors beside the fields they name (a list's item beside the list); returns those that have no field here. */
  function showErrors(errors, names) {
    const left = [...errors];
    for (const name of names) {
      const at = left.findIndex((error) => error.field === name || error.field.startsWith(`${name}.`));
      const [own] = at < 0 ? [] : left.splice(at, 1);
      const input = inputs[name];
      const beside = page.querySelector(`#${input.id}-error`);
      beside.textContent = own ? own.message + (own.allowed ? ` (allowed: ${own.allowed})` : "") : "";
      own ? input.setAttribute("aria-invalid", "true") : input.removeAttribute("aria-invalid");
      if (own) input.closest("details")?.setAttribute("open", "");
    }
    return left;
  }
}

function describeModel(found) {
  if (!found.supported) return [h("p", { class: "error" }, found.reason.message)];
  if (!found.shape) return [h("p", {}, "This service can prune it; its sizes are known once it is loaded.")];
  const layers = found.shape.layers;
  const range = (size) => {
    const sizes = layers.map((layer) => layer[size]);
    const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
    return least === most ? number(most) : `${number(least)} to ${number(most)}`;
  };
  return [
    h("h2", {}, found.model_id),
    h("p", {}, `${found.shape.family}, ${number(found.shape.parameters)} parameters, ${layers.length} layers of ${range("heads")} heads (${range("kv_groups")} KV groups) and ${range("channels")} channels`),
    h("ul", {}, found.sizes.map((size) => h("li", {}, `at ${percent(size.target_ratio, 0)}: ${number(size.parameters)} parameters, ${megabytes(size.bytes)}`))),
    h("ul", {}, found.structures.map((each) => h("li", {}, each.reason
      ? `${each.structure}: ${each.reason}`
      : `${each.structure}: ${number(each.units)}${each.max_ratio === null ? "" : `, at most ${percent(each.max_ratio, 0)}`}`))),
  ];
}
