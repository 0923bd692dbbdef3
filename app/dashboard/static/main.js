// Routing: selects the view for the address and renders the frame around it. Addresses are URL fragments: #/jobs, #/jobs/ID,
// #/new, #/compare?jobs=A,B.

import { announce, h } from "./dom.js";
import { key } from "./api.js";
import { compareView } from "./compare.js";
import { jobView } from "./job.js";
import { jobsView } from "./jobs.js";
import { signInView } from "./signin.js";
import { submitView } from "./submit.js";

const PAGES = [["#/jobs", "Jobs"], ["#/new", "New job"], ["#/compare", "Compare"]];
const VIEWS = [
  [/^\/jobs\/([0-9a-f-]+)$/, jobView],
  [/^\/jobs$/, jobsView],
  [/^\/new$/, submitView],
  [/^\/compare$/, compareView],
];

const main = document.getElementById("main");
let leave = new AbortController();

function takeKey() {
  const given = /^#key=(.+)$/.exec(location.hash);
  if (!given) return;
  key.set(decodeURIComponent(given[1]));
  history.replaceState(null, "", "#/jobs");
}

function show() {
  takeKey();
  leave.abort(); // what the last view still had under way
  leave = new AbortController();
  const [path, query] = (location.hash.slice(1) || "/jobs").split("?");
  const [pattern, view] = VIEWS.find(([known]) => known.test(path)) ?? [null, notFound];
  const page = h("div", { class: "page" });
  main.replaceChildren(page);
  showNavigation(path);
  const context = { page, signal: leave.signal, query: new URLSearchParams(query), id: pattern?.exec(path)[1] };
  (key.get() ? view : signInView)(context);
  const title = page.querySelector("h1")?.textContent ?? "Secateur";
  document.title = `${title} – Secateur`;
  announce(title);
}

function showNavigation(path) {
  const links = PAGES.map(([href, name]) => h("a", { href, "aria-current": href === `#${path}` ? "page" : null }, name));
  const out = h("button", { type: "button", class: "plain", onclick: signOut }, "Sign out");
  document.getElementById("nav").replaceChildren(...(key.get() ? [...links, out] : []));
}

function signOut() {
  key.forget();
  show();
}

function notFound({ page }) {
  page.append(h("h1", {}, "No such page"), h("p", {}, h("a", { href: "#/jobs" }, "All jobs")));
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment is the address
  main.focus();
});
window.addEventListener("hashchange", show);
window.addEventListener("unauthorized", signOut);
show();
