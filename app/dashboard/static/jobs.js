// The list of jobs, which the page reloads while it is open.

import { Problem, get } from "./api.js";
import { h, percent, perplexity, table, time } from "./dom.js";

export const STATES = ["queued", "running", "publishing", "paused", "cancelling", "succeeded", "failed", "cancelled"];
const AGAIN_MS = 3000;
const PAGE_SIZE = 25;

export const badge = (state) => h("span", { class: `badge ${state}` }, state);

export function jobsView({ page, signal, query }) {
  const state = h("select", { id: "state", onchange: () => navigate({ state: state.value, page: "" }) },
    h("option", { value: "" }, "all states"),
    STATES.map((name) => h("option", { value: name, selected: name === query.get("state") }, name)));
  const list = h("div", {});
  const chosen = new Set();
  let shown = null;
  const compare = h("a", { class: "button", href: "#/compare" }, "Compare chosen");
  page.append(
    h("div", { class: "bar" }, h("h1", {}, "Jobs"), h("a", { class: "button primary", href: "#/new" }, "New job")),
    h("div", { class: "bar" }, h("div", { class: "field inline" }, h("label", { for: "state" }, "Show"), state), compare),
    list);

  function navigate(changes) {
    const wanted = new URLSearchParams(query);
    for (const [name, value] of Object.entries(changes)) value ? wanted.set(name, value) : wanted.delete(name);
    location.hash = `#/jobs${wanted.size ? `?${wanted}` : ""}`;
  }

  function choose(job, box) {
    box.checked ? chosen.add(job.id) : chosen.delete(job.id);
    compare.href = `#/compare?jobs=${[...chosen].join(",")}`;
  }

  function row(job) {
    const box = job.state === "succeeded" &&
      h("input", { type: "checkbox", checked: chosen.has(job.id), "aria-label": `choose ${job.model_id} to compare`, onchange: (event) => choose(job, event.target) });
    return [h("a", { href: `#/jobs/${job.id}` }, job.model_id), badge(job.state), job.method, ...outcome(job), time(job.created_at), box || ""];
  }

  async function refresh() {
    const parameters = new URLSearchParams({ page_size: PAGE_SIZE });
    for (const [name, from] of [["state", "state"], ["page_token", "page"]]) if (query.get(from)) parameters.set(name, query.get(from));
    try {
      const { items, next_page_token: next } = await get(`/v1/jobs?${parameters}`, signal);
      const news = JSON.stringify(items);
      if (news !== shown) show(items, next);
      shown = news;
    } catch (problem) {
      if (signal.aborted) return;
      shown = null;
      list.replaceChildren(h("p", { class: "error", role: "alert" }, problem instanceof Problem ? problem.message : "The service does not answer; trying again."));
    }
    setTimeout(() => signal.aborted || refresh(), AGAIN_MS);
  }

  function show(items, next) {
    const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    list.replaceChildren(
        items.length ? table("Jobs", ["Model", "State", "Method", "Progress or ratio", "Perplexity", "Made", "Compare"], items.map(row), (at) => at === 3 || at === 4)
          : h("p", { class: "card" }, "There are no jobs here yet."),
        h("div", { class: "bar" },
          query.get("page") ? h("button", { type: "button", onclick: () => navigate({ page: "" }) }, "Newest") : h("span", {}),
          next && h("button", { type: "button", onclick: () => navigate({ page: next }) }, "Older")));
    if (focused) list.querySelector(`[href="${focused}"]`)?.focus();
  }

  refresh();
}

/** What a job has come to: how far it is, or the ratio and the perplexity before and after. */
function outcome(job) {
  const results = job.result?.targets ?? (job.result ? [job.result] : []);
  if (job.state === "succeeded" && results.length) {
    return [
      results.map((result) => percent(result.ratio.reached)).join(", "),
      `${perplexity(results[0].perplexity.before)} → ${results.map((result) => perplexity(result.perplexity.after)).join(", ")}`,
    ];
  }
  if (job.state === "failed") return [job.error?.code ?? "", ""];
  return [job.progress && !["cancelled"].includes(job.state) ? percent(job.progress.share, 0) : "–", ""];
}
