// The comparison of several jobs on one chart of size and quality, with the Pareto front.

import { Problem, get } from "./api.js";
import { paretoChart } from "./charts.js";
import { fixed, h, megabytes, number, percent, perplexity, table } from "./dom.js";

const MOST = 50;
const SIZES = {
  parameters: ["parameters", (report, when) => report.parameters[when]],
  bytes: ["bytes of weights", (report, when) => report.weights_bytes[when]],
  decode: ["ms a token", (report, when) => report.latency[when]?.decode_ms_per_token],
};
const QUALITIES = {
  perplexity: ["perplexity", (report, when) => report.perplexity[when], "smaller"],
  bytes: ["nats a byte", (report, when) => report.nats_per_byte?.[when], "smaller"],
  accuracy: ["mean zero-shot accuracy", (report, when) => report.benchmarks?.zero_shot_mean?.[when], "larger"],
};

const measuredOn = ({ evaluation }) => `${evaluation.tokens} tokens of ${evaluation.source}`;

export function compareView({ page, signal, query }) {
  const choices = h("div", { class: "card" });
  const shown = h("section", { "aria-live": "polite" });
  const select = (id, label, options) => {
    const input = h("select", { id, onchange: draw }, Object.entries(options).map(([name, [title]]) => h("option", { value: name }, title)));
    return [h("div", { class: "field inline" }, h("label", { for: id }, label), input), input];
  };
  const [sizeField, size] = select("size", "Size", SIZES);
  const [qualityField, quality] = select("quality", "Quality", QUALITIES);
  page.append(h("h1", {}, "Compare"), choices, h("div", { class: "bar" }, sizeField, qualityField), shown);
  const chosen = new Set((query.get("jobs") ?? "").split(",").filter(Boolean));
  const reports = new Map();

  const guarded = (work) => work().catch((problem) => {
    if (!signal.aborted) shown.replaceChildren(h("p", { class: "error", role: "alert" }, problem instanceof Problem ? problem.message : "The service does not answer."));
  });

  guarded(async () => {
    const { items } = await get(`/v1/jobs?state=succeeded&page_size=${MOST}`, signal);
    for (const id of chosen) if (!items.some((job) => job.id === id)) items.push(await get(`/v1/jobs/${id}`, signal));
    choices.replaceChildren(h("fieldset", {}, h("legend", {}, "Jobs that have succeeded"),
      items.length ? items.map((job) => h("label", { class: "choice" },
        h("input", { type: "checkbox", value: job.id, checked: chosen.has(job.id), onchange: (event) => guarded(() => choose(event.target)) }),
        ` ${job.model_id}, ${job.method}, ${(job.result?.targets ?? [job.result]).map((result) => percent(result?.ratio?.reached)).join(", ")}`)) : "None yet."));
    await fetchChosen();
    draw();
  });

  async function choose(box) {
    box.checked ? chosen.add(box.value) : chosen.delete(box.value);
    history.replaceState(null, "", `#/compare?jobs=${[...chosen].join(",")}`);
    await fetchChosen();
    draw();
  }

  async function fetchChosen() {
    for (const id of chosen) {
      if (reports.has(id)) continue;
      const report = await get(`/v1/jobs/${id}/report`, signal);
      reports.set(id, report.targets ?? [report]);
    }
  }

  /** A point for every pruned model, and one for each unpruned source. */
  function points() {
    const found = new Map();
    for (const id of chosen) {
      for (const report of reports.get(id) ?? []) {
        const source = report.source.model_id;
        found.set(`source ${source} ${measuredOn(report)}`, { name: `${source}, unpruned`, report, when: "before", href: `#/jobs/${id}` });
        found.set(`${id} ${report.ratio.target}`, { name: `${source}, ${report.spec.method}, ${percent(report.ratio.reached)}`, report, when: "after", href: `#/jobs/${id}` });
      }
    }
    return [...found.values()];
  }

  function draw() {
    const [xLabel, xOf] = SIZES[size.value];
    const [yLabel, yOf, yBetter] = QUALITIES[quality.value];
    const models = points().map((point) => ({ ...point, x: xOf(point.report, point.when), y: yOf(point.report, point.when) }));
    const placed = models.filter(({ x, y }) => x != null && y != null);
    if (!models.length) return shown.replaceChildren(h("p", { class: "hint" }, "Choose jobs above."));
    if (!placed.length) return shown.replaceChildren(h("p", { class: "hint" }, "None of these was measured so: ask for it in the request's evaluation."));
    const texts = new Set(models.map((point) => measuredOn(point.report)));
    return shown.replaceChildren(
      texts.size > 1 ? h("p", { class: "card error" }, `Measured on different texts, so perplexities cannot be compared: ${[...texts].join("; ")}.`) : "",
      models.some(({ report }) => report.vocabulary) && quality.value === "perplexity"
        ? h("p", { class: "card error" }, "Some vocabularies were cut, so perplexities count different tokens: compare nats a byte.") : "",
      h("div", { class: "charts wide" }, paretoChart({ title: `${yLabel} against ${xLabel}`, xLabel, yLabel, points: placed, yBetter })),
      h("div", { class: "card" }, table("Models", ["", "model", "parameters", "weights", "perplexity", "accuracy", "ms a token"], models.map((point) => [
        placed.includes(point) ? String(placed.indexOf(point) + 1) : "–",
        h("a", { href: point.href }, point.name),
        number(SIZES.parameters[1](point.report, point.when)),
        megabytes(SIZES.bytes[1](point.report, point.when)),
        perplexity(QUALITIES.perplexity[1](point.report, point.when)),
        percent(QUALITIES.accuracy[1](point.report, point.when)),
        fixed(SIZES.decode[1](point.report, point.when), 1),
      ]), (at) => at > 1)));
  }
}
