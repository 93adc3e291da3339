"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("tip"), find = document.getElementById("find"), hits = document.querySelector(".hits");
const samples = all("article");
const known = new Map();
let current = null;

function line(name, text) {
  const element = document.createElement(name);
  element.dir = "auto";
  element.textContent = text;
  tip.append(element);
}

function show(token) {
  current?.classList.remove("at");
  current = token;
  tip.hidden = !token;
  if (!token) return;
  token.classList.add("at");
  const { p, i, l, n, x } = token.dataset, { role, turn } = token.closest(".run").dataset;
  tip.replaceChildren();
  line("b", x ?? JSON.stringify(token.textContent));
  line("span", `position ${p} · id ${i}` + (token.classList.contains("sp") ? " · special" : ""));
  line("span", `label ${l}` + (l === "-100" ? " (not trained on)" : ` (trained on, from position ${p - 1})`));
  line("span", `role ${role}` + (turn ? ` · turn ${turn}` : ""));
  if (n) line("span", `${n} nats · p = ${Math.exp(-n).toPrecision(2)}`);
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = box.bottom + 8 + own.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - own.width - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : Math.max(8, box.top - own.height - 8)) + "px";
}

function step(event) {
  if (event.key === "Escape") return show(null);
  const chat = event.target.closest(".chat"), steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  if (!chat || !(event.key in steps)) return;
  event.preventDefault();
  const tokens = all(".t", chat).filter((token) => token.getClientRects().length);
  if (!tokens.length) return;
  const next = Math.min(Math.max(tokens.indexOf(current) + steps[event.key], 0), tokens.length - 1);
  tokens[next].scrollIntoView({ block: "nearest" });
  show(tokens[next]);
}

function words(sample) {
  if (!known.has(sample)) {
    const parts = all(".place, .name, .run", sample).map((part) => part.textContent);
    known.set(sample, parts.join("\n").normalize("NFKC").toLowerCase());
  }
  return known.get(sample);
}

function search() {
  const wanted = find.value.normalize("NFKC").toLowerCase().trim();
  const kind = document.body.dataset.show, inside = kind === "all" ? ".turn" : `.turn[data-has~=${kind}]`;
  let number = 0;
  for (const sample of samples) {
    sample.hidden = !(words(sample).includes(wanted) && sample.querySelector(inside));
    number += !sample.hidden;
  }
  hits.textContent = `${number} of ${samples.length} samples`;
  show(null);
}

function reset() {
  find.value = "";
  document.querySelector("[name=show][value=all]").checked = true;
  document.body.dataset.show = "all";
  search();
}

document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
find.addEventListener("input", search);
all("[name=show]").forEach((input) => input.addEventListener("change", () => {
  document.body.dataset.show = input.value;
  search();
}));
document.getElementById("grid").addEventListener("change", (event) => {
  document.body.dataset.grid = event.target.checked ? "on" : "off";
});
if (innerWidth <= 760) document.querySelector(".surprising")?.removeAttribute("open");
all(".surprising a").forEach((link) => link.addEventListener("click", reset));
document.addEventListener("mouseover", (event) => show(event.target.closest("main article .t")));
document.addEventListener("click", (event) => show(event.target.closest("main article .t")));
document.addEventListener("keydown", step);
document.addEventListener("focusout", () => show(null));
document.addEventListener("scroll", () => tip.hidden || tip.matches(":hover") || document.activeElement?.matches(".chat") || show(null), { passive: true });
all("fieldset label").forEach((label) => {
  const kind = label.firstChild.value;
  label.hidden = !["all", "supervised"].includes(kind) && !document.querySelector(`.turn[data-has~=${kind}]`);
});
search();
