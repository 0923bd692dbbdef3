// The sign-in view, which asks for the API key once per browser tab.

import { Problem, get, key } from "./api.js";
import { h } from "./dom.js";

export function signInView({ page }) {
  const input = h("input", { id: "key", type: "password", autocomplete: "off", required: true, spellcheck: "false", "aria-describedby": "key-error" });
  const error = h("p", { id: "key-error", class: "error", role: "alert" });

  async function signIn(event) {
    event.preventDefault();
    key.set(input.value.trim());
    try {
      await get("/v1/jobs?page_size=1");
      window.dispatchEvent(new Event("hashchange"));
    } catch (problem) {
      key.forget();
      error.textContent = problem instanceof Problem ? problem.message : "The service does not answer.";
    }
  }

  page.append(
    h("h1", {}, "Sign in"),
    h("form", { class: "card narrow", onsubmit: signIn },
      h("label", { for: "key" }, "API key"), input, error,
      h("p", { class: "hint" }, "It stays in this tab. `secateur keys create NAME` makes one; `secateur up` prints one."),
      h("button", { class: "primary" }, "Sign in")));
}
