// The view of one job: its live progress, its steps, its result, and the request with which to repeat it.

import { Problem, download, follow, get, key, post, remove } from "./api.js";
import { barChart, lineChart } from "./charts.js";
import { announce, duration, fixed, h, megabytes, number, percent, perplexity, table, time } from "./dom.js";
import { badge } from "./jobs.js";

const ENDED = ["succeeded", "failed", "cancelled"];
const ACTIONS = {
  cancel: ["queued", "running", "publishing", "paused"],
  pause: ["queued", "running"],
  resume: ["paused"],
  retry: ["failed", "cancelled"],
};
const SOON_MS = 150;

export function jobView({ page, signal, id }) {
  const path = `/v1/jobs/${id}`;
  const parts = Object.fromEntries(["head", "progress", "error", "results", "steps", "files", "events", "request"].map((name) => [name, h("section", {})]));
  page.append(...Object.values(parts));
  const seen = [];
  let job, soon;

  async function load() {
    job = await get(path, signal);
    const done = job.state === "succeeded";
    const [{ items: steps }, report, files] = await Promise.all([
      get(`${path}/steps`, signal),
      done ? get(`${path}/report`, signal) : null,
      done ? get(`${path}/artifacts`, signal) : null,
    ]);
    const open = openDetails(page);
    showHead();
    showProgress(job.progress);
    parts.error.replaceChildren(job.error ? h("div", { class: "card error", role: "alert" }, h("strong", {}, job.error.code), ` ${job.error.message}`) : "");
    parts.request.replaceChildren(...describeRequest(job.request));
    parts.results.replaceChildren(...(report?.targets ?? (report ? [report] : [])).flatMap(describeReport));
    parts.steps.replaceChildren(...describeSteps(steps));
    parts.files.replaceChildren(...describeFiles(files?.items ?? [], job.result));
    for (const name of open) page.querySelector(`[data-details="${CSS.escape(name)}"]`)?.setAttribute("open", "");
  }

  const guarded = (work) => work().catch((problem) => {
    if (!signal.aborted) parts.error.replaceChildren(h("p", { class: "card error", role: "alert" }, problem instanceof Problem ? problem.message : "The service does not answer."));
  });

  function showHead() {
    parts.head.replaceChildren(
      h("p", {}, h("a", { href: "#/jobs" }, "← All jobs")),
      h("div", { class: "bar" },
        h("h1", {}, job.model_id),
        h("div", { class: "buttons" },
          Object.entries(ACTIONS).filter(([, states]) => states.includes(job.state)).map(([name]) => h("button", { type: "button", onclick: () => guarded(() => ask(name)) }, name)),
          ENDED.includes(job.state) && h("button", { type: "button", onclick: () => guarded(forget) }, "delete"))),
      h("p", { class: "facts" }, badge(job.state), h("span", {}, job.method), h("span", {}, "made ", time(job.created_at)),
        job.finished_at && h("span", {}, `took ${duration((new Date(job.finished_at) - new Date(job.started_at ?? job.created_at)) / 1000)}`),
        job.pause_requested && h("span", {}, "pauses at the end of the step"),
        Object.entries(job.labels).map(([name, value]) => h("span", { class: "label" }, `${name}=${value}`))));
  }

  function showProgress(progress) {
    if (!progress || ENDED.includes(job.state)) return parts.progress.replaceChildren();
    const left = progress.estimated_finish_at ? (new Date(progress.estimated_finish_at) - Date.now()) / 1000 : null;
    const rate = progress.rate ? `, ${number(Math.round(progress.rate))} ${progress.rate_unit}` : "";
    return parts.progress.replaceChildren(h("div", { class: "card" },
      h("label", { for: "progress" }, `${progress.stage}, step ${progress.step} of ${progress.steps}: ${percent(progress.share, 0)}${rate}`, left > 0 ? `, about ${duration(left)} left` : ""),
      h("progress", { id: "progress", max: "1", value: String(progress.share) })));
  }

  async function ask(action) {
    await post(`${path}/${action}`);
    announce(`${action}: asked for`);
    await load();
    if (action === "retry" || action === "resume") listen();
  }

  async function forget() {
    if (!confirm("Delete this job and its files? What was published stays.")) return;
    await remove(path);
    location.hash = "#/jobs";
  }

  function listen() {
    seen.length = 0;
    guarded(() => follow(id, (name, data) => {
      if (name === "progress") return showProgress(data);
      if (name !== "end") {
        seen.unshift(data);
        showEvents();
      }
      clearTimeout(soon); // a burst of events is one look
      soon = setTimeout(() => signal.aborted || guarded(load), SOON_MS);
      if (name === "end") announce(`The job has ${data.state ?? "ended"}.`);
    }, signal));
  }

  function showEvents() {
    const open = openDetails(parts.events);
    parts.events.replaceChildren(h("details", { class: "card", "data-details": "events", open: open.includes("events") }, h("summary", {}, `Events (${seen.length})`),
      h("ol", { class: "events" }, seen.map((event) => h("li", {}, time(event.created_at), h("strong", {}, event.type), describeEvent(event))))));
  }

  function describeRequest(request) {
    const { model_id, ...rest } = request;
    const body = JSON.stringify({ model_id, ...withoutNulls(rest) }, null, 2);
    const curl = `curl ${location.origin}/v1/jobs -H "Authorization: Bearer $SECATEUR_API_KEY" -H 'Content-Type: application/json' \\\n  -d '${body.replaceAll("'", String.raw`'\''`)}'`;
    const copy = (text) => h("button", { type: "button", onclick: async (event) => {
      await navigator.clipboard.writeText(text);
      event.target.textContent = "copied";
      announce("copied");
    } }, "copy");
    return [h("details", { class: "card", "data-details": "request" }, h("summary", {}, "The request, to repeat it"),
      h("div", { class: "bar" }, h("h3", {}, "JSON"), copy(body)), h("pre", { class: "code", tabindex: "0" }, body),
      h("div", { class: "bar" }, h("h3", {}, "curl"), copy(curl)), h("pre", { class: "code", tabindex: "0" }, curl))];
  }

  parts.head.append(h("h1", {}, "Job"));
  guarded(async () => {
    await load();
    listen();
  });
}

const openDetails = (element) => [...element.querySelectorAll("details[open][data-details]")].map((details) => details.dataset.details);

function withoutNulls(value) {
  if (Array.isArray(value) || typeof value !== "object" || value === null) return value;
  return Object.fromEntries(Object.entries(value).filter(([, item]) => item !== null).map(([name, item]) => [name, withoutNulls(item)]));
}

function describeEvent({ type, attempt, data }) {
  if (type === "state") return `${data.from ?? "made"} → ${data.to}${data.error ? `: ${data.error.message}` : ""}`;
  if (type === "step") return `step ${data.number} (${data.kind}): perplexity ${perplexity(data.perplexity)}`;
  return `attempt ${attempt}: ${data.message ?? JSON.stringify(data)}`;
}

/** What a target came to: the table before and after, widths, what both models write. */
function describeReport(report) {
  const title = `Pruned by ${percent(report.ratio.reached)}`;
  const speed = (when, name) => {
    const measured = report.latency[when];
    if (!measured) return "–";
    const [low, high] = measured.spread[name];
    return `${fixed(measured[name], 1)} (${fixed(low, 1)} to ${fixed(high, 1)})`;
  };
  const change = (before, after) => (before && after != null ? `${after >= before ? "+" : "−"}${percent(Math.abs(after / before - 1))}` : "–");
  const pair = (name, { before, after }, show) => [name, show(before), show(after), change(before, after)];
  const accuracy = (value) => percent(value);
  const { perplexity: texts = {}, zero_shot: tasks = {}, zero_shot_mean: mean } = report.benchmarks ?? {};
  const rows = [
    pair("parameters", report.parameters, number),
    pair("weights", report.weights_bytes, megabytes),
    pair("FLOPs of a 256-token prefill", report.flops, (value) => value.toExponential(2)),
    pair("perplexity", report.perplexity, perplexity),
    ...wholeUnits(report).filter(([, { before, after }]) => before !== after).map(([name, values]) => pair(name, values, number)),
    ...(report.vocabulary ? [pair("tokens of the vocabulary", report.vocabulary, number)] : []),
    ...(report.nats_per_byte ? [pair("loss (nats a byte)", report.nats_per_byte, (value) => fixed(value, 4))] : []),
    ...Object.entries(texts).map(([name, values]) => pair(`perplexity, ${name}`, values, perplexity)),
    ...Object.entries(tasks).map(([name, task]) => pair(`${name} (${task.metric}, ${task.examples} examples)`, task, accuracy)),
    ...(mean ? [pair("mean accuracy", mean, accuracy)] : []),
  ];
  for (const [name, label] of [["prefill_ms", "prefill (ms)"], ["decode_ms_per_token", "decode (ms a token)"]]) {
    const [before, after] = ["before", "after"].map((when) => report.latency[when]?.[name]);
    if (before) rows.push([label, speed("before", name), speed("after", name), change(before, after)]);
  }
  if (report.latency.before?.tokens_per_second) {
    rows.push(pair("tokens a second", { before: report.latency.before.tokens_per_second, after: report.latency.after?.tokens_per_second }, (value) => fixed(value, 0)));
  }
  if (report.peak_memory_bytes.before) rows.push(pair("peak memory", report.peak_memory_bytes, megabytes));
  const widths = (name) => ["before", "after"].map((when) => ({ name: when, values: report.widths[when].map((layer) => layer[name]) }));
  const written = report.generations ?? [];
  return [
    h("h2", {}, title),
    h("p", { class: "facts" },
      h("span", {}, `${percent(report.ratio.of_all_parameters)} of all parameters`),
      h("span", {}, `${percent(report.ratio.of_flops)} of FLOPs`),
      report.redundancy_removed != null && h("span", {}, `${percent(report.redundancy_removed)} of all units`),
      report.retained_accuracy != null && h("span", {}, `${percent(report.retained_accuracy)} of the accuracy retained`)),
    h("div", { class: "card" }, table(`${title}: before and after`, ["", "before", "after", "change"], rows),
      h("p", { class: "hint" }, `${report.evaluation.tokens} tokens of ${report.evaluation.source}; ${report.dtype} on ${report.device}. Latency: medians, with the fastest and the slowest repeat.`)),
    h("div", { class: "charts" },
      barChart({ title: "Attention heads by layer", yLabel: "heads", series: widths("heads") }),
      barChart({ title: "Feed-forward channels by layer", yLabel: "channels", series: widths("channels") })),
    written.length ? h("div", { class: "card" }, h("h3", {}, "What both models write"),
      written.map(({ prompt, before, after }) => h("div", { class: "pair" },
        h("p", { class: "prompt" }, prompt),
        h("figure", {}, h("figcaption", {}, "before"), h("blockquote", {}, before)),
        h("figure", {}, h("figcaption", {}, "after"), h("blockquote", {}, after))))) : null,
  ].filter(Boolean);
}

/** The numbers of layers and of experts of a layer, before and after. */
function wholeUnits({ widths: { before, after } }) {
  const layers = (widths) => widths.filter(({ heads, channels }) => heads || channels).length;
  const experts = (widths) => Math.max(0, ...widths.filter(({ channels }) => channels).map((layer) => layer.experts ?? 1));
  return [["layers", layers], ["experts of a layer", experts]].map(([name, count]) => [name, { before: count(before), after: count(after) }]);
}

/** The splits that were tried where structures compete. */
function describeTrials(steps) {
  const tried = steps.filter(({ data }) => data.kind === "round" && data.trials?.length);
  const said = (removed) => Object.entries(removed).map(([name, count]) => `${count} ${name}`).join(", ") || "widths alone";
  return tried.map(({ data }) => h("div", { class: "card" }, table(`Structures that competed for ${percent(data.target_ratio)}; the first was taken`, ["whole units", "loss (nats a token)"],
    data.trials.map(({ removed, loss }) => [said(removed), loss == null ? "infinite" : fixed(loss, 4)]))));
}

/** Perplexity by step, and the last sensitivities and losses. */
function describeSteps(steps) {
  const measured = steps.filter(({ data }) => data.perplexity != null);
  if (!measured.length) return [];
  const targets = [...new Set(steps.filter(({ number: at }) => at > 0).map(({ data }) => data.target_ratio))];
  const first = measured.find(({ number: at }) => at === 0);
  const series = targets.map((ratio) => ({
    name: `ratio ${ratio}`,
    points: [...(first ? [[0, first.data.perplexity]] : []), ...measured.filter(({ number: at, data }) => at > 0 && data.target_ratio === ratio).map(({ data }, at) => [at + 1, data.perplexity])],
  })).filter((line) => line.points.length);
  const charts = [];
  if (series.length) charts.push(lineChart({ title: "Perplexity by step (0: unpruned)", xLabel: "step", yLabel: "perplexity", series }));
  const sensitive = steps.findLast(({ data }) => data.sensitivity);
  if (sensitive) charts.push(barChart({ title: "Sensitivity of the layers, last round", yLabel: "sensitivity", series: [{ name: "sensitivity", values: sensitive.data.sensitivity }] }));
  const trained = steps.findLast(({ data }) => data.training?.loss?.length);
  if (trained) charts.push(lineChart({ title: `Loss while training (${trained.data.training.kind})`, xLabel: "step", yLabel: "loss", series: [{ name: "loss", points: trained.data.training.loss.map((loss, at) => [at + 1, loss]) }] }));
  return [h("h2", {}, "Steps"), h("div", { class: "charts" }, charts),
    h("div", { class: "card" }, table("Steps", ["step", "target", "reached", "parameters", "perplexity", "time"],
      measured.map(({ number: at, data }) => [String(at), percent(data.target_ratio), percent(data.ratio?.reached), number(data.parameters), perplexity(data.perplexity), data.seconds == null ? "–" : duration(data.seconds)]))),
    ...describeTrials(steps)];
}

const isWeb = (url) => /^https?:/.test(url);

function describeFiles(files, result) {
  const results = result?.targets ?? (result ? [result] : []);
  const published = results.filter((each) => each.repo_id);
  if (!files.length && !published.length) return [];
  return [
    h("h2", {}, "Model"),
    published.length ? h("ul", {}, published.map((each) => h("li", {}, isWeb(each.url) ? h("a", { href: each.url, rel: "noreferrer" }, each.repo_id) : each.repo_id, ` at ${each.commit_sha.slice(0, 12)}`))) : null,
    files.length ? h("details", { class: "card", "data-details": "files" }, h("summary", {}, `Files (${files.length})`),
      table("Files", ["file", "size"], files.map((file) => [
        h("button", { type: "button", class: "plain", onclick: () => download(file.url, file.name.split("/").at(-1)) }, file.name), megabytes(file.size)]))) : null,
  ].filter(Boolean);
}
