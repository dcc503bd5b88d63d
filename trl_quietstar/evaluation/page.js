"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const texts = document.getElementById("texts");
const details = document.getElementById("details");
// each step is about three times the one before it, and the same on every page, so that pages can be compared
const STEPS = [0.01, 0.03, 0.1, 0.3];
let chosen = null; // the token whose details stay
let hovered = null; // the token under the pointer
let pointer = ""; // where that is on the screen

// Everything that was written by a model or a user goes through here, as text.
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function add(parent, ...children) {
  parent.append(...children);
  return parent;
}

function number(value, digits = 3) {
  return value === null ? "undefined" : value.toFixed(digits).replace("-", "−");
}

function signed(value) {
  return value > 0 ? "+" + number(value) : number(value);
}

function shade(gain) {
  const level = STEPS.filter((step) => Math.abs(gain ?? 0) >= step).length;
  return level === 0 ? "neutral" : (gain > 0 ? "helped-" : "hurt-") + level;
}

function visible(piece) {
  if (piece === "") return "·";
  return (piece.trim() === "" ? piece.replaceAll(" ", "␣") : piece).replaceAll("\n", "↵");
}

function tokenAt(t, i) {
  return document.getElementById(`t${t}-${i}`);
}

function place(token) {
  return token.id.slice(1).split("-").map(Number);
}

// The text

function showLegend() {
  const legend = add(element("div", "legend"), element("div", "", "A token's colour is the gain of the first thought written after it: what it adds to the log-probability of the next tokens, on average, in nats. Point at a token, or use Tab and the arrow keys; Escape clears."));
  const scale = element("ul", "scale");
  const edges = STEPS.map(String);
  for (const level of [4, 3, 2, 1]) scale.append(element("li", "hurt-" + level, (level === 4 ? "≤ −" : "−") + edges[level - 1]));
  scale.append(element("li", "neutral", "no change"));
  for (const level of [1, 2, 3, 4]) scale.append(element("li", "helped-" + level, (level === 4 ? "≥ +" : "+") + edges[level - 1]));
  scale.prepend(element("li", "", "hurt"));
  scale.append(element("li", "", "helped"));
  document.getElementById("legend").append(add(legend, scale));
}

function makeToken(token, t, i) {
  const made = element("span", "", token.piece);
  if (token.piece.includes("\n")) made.classList.add("newline");
  if (token.piece === "") made.classList.add("unfinished");
  made.classList.add("token");
  if (token.thoughts.length === 0) return made;
  const gain = token.thoughts[0].gain;
  made.classList.add("thinks", shade(gain));
  made.id = `t${t}-${i}`;
  made.tabIndex = -1;
  made.setAttribute("role", "button");
  made.setAttribute("aria-controls", "details");
  made.setAttribute("aria-label", `${visible(token.piece)}, gain ${signed(gain)} nats`);
  return made;
}

function showTexts() {
  data.texts.forEach((text, t) => {
    const box = element("div", "text");
    box.dir = "auto";
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `Text ${t + 1} of ${data.texts.length}; arrow keys move between tokens`);
    text.tokens.forEach((token, i) => box.append(makeToken(token, t, i)));
    const first = box.querySelector(".thinks");
    if (first) first.tabIndex = 0;
    texts.append(box);
  });
}

// The details of a token

function tokenLine(token) {
  if (token.nll_without === null) return "This token was not predicted.";
  const without = `This token: ${number(token.nll_without)} nats without a thought before it`;
  return token.nll_with === null ? without + "." : `${without}, ${number(token.nll_with)} with the first one.`;
}

function thoughtItem(thought, g) {
  const gain = element("span", "gain " + shade(thought.gain), signed(thought.gain) + " nats");
  const numbers = add(element("div", "numbers"), element("span", "", g === 0 ? "first thought" : `alternative ${g}`), gain,
    element("span", "soft", "weight " + number(thought.weight, 2)));
  return add(element("li"), numbers, element("div", "quote", thought.text));
}

function heading(text, scope) {
  const made = element("th", "", text);
  made.scope = scope;
  return made;
}

function talkTable(tokens, i) {
  const thoughts = tokens[i].thoughts;
  const table = add(element("table"), element("caption", "", "NLL of what follows, nats"));
  const head = add(element("tr"), heading("next", "col"), heading("without", "col"));
  thoughts.forEach((_, g) => head.append(heading(g === 0 ? "first" : `alt. ${g}`, "col")));
  table.append(head);
  thoughts[0].nll_with.forEach((_, m) => {
    const next = tokens[i + 1 + m];
    const name = heading("", "row");
    name.append(element("span", "quote", visible(next.piece)));
    const row = add(element("tr"), name, element("td", "", next.nll_without === null ? "–" : number(next.nll_without, 2)));
    for (const thought of thoughts) row.append(element("td", "", thought.nll_with[m] === null ? "–" : number(thought.nll_with[m], 2)));
    table.append(row);
  });
  return add(element("div", "scroll"), table);
}

function showDetails(token) {
  details.replaceChildren();
  if (token === null) {
    details.append(element("p", "soft", "Choose a token to see what was thought after it, what that did to the next tokens, and how much weight the mixing head gave it."));
    return;
  }
  const [t, i] = place(token);
  const tokens = data.texts[t].tokens;
  const title = add(element("h2", "", "After "), element("span", "quote", visible(tokens[i].piece)));
  const list = element("ol", "thoughts");
  tokens[i].thoughts.forEach((thought, g) => list.append(thoughtItem(thought, g)));
  details.append(title, element("p", "soft", `Token ${i + 1} of ${tokens.length}. ${tokenLine(tokens[i])}`), list, talkTable(tokens, i));
}

// Choosing

function choose(token) {
  if (chosen) chosen.removeAttribute("aria-current");
  chosen = token;
  hovered = null;
  if (token) {
    token.setAttribute("aria-current", "true");
    for (const other of token.parentElement.querySelectorAll('.thinks[tabindex="0"]')) other.tabIndex = -1;
    token.tabIndex = 0;
  }
  showDetails(token);
}

function jump(token) {
  token.focus({ preventScroll: true });
  token.scrollIntoView({ block: "nearest" });
}

// The nearest token of the line above (-1) or below (1).
function onNextLine(token, all, direction) {
  const from = token.getBoundingClientRect();
  const beyond = all.map((other) => [other, other.getBoundingClientRect()])
    .filter(([, box]) => (box.top - from.top) * direction > from.height / 2);
  if (beyond.length === 0) return token;
  const line = Math.min(...beyond.map(([, box]) => box.top * direction));
  const distance = ([, box]) => Math.abs(box.left + box.width / 2 - from.left - from.width / 2);
  return beyond.filter(([, box]) => box.top * direction < line + from.height / 2)
    .reduce((best, other) => (distance(other) < distance(best) ? other : best))[0];
}

function onKey(event) {
  if (event.key === "Escape") return choose(null);
  const token = event.target.closest(".thinks");
  if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = [...token.parentElement.querySelectorAll(".thinks")];
  const at = all.indexOf(token);
  const target = {
    ArrowRight: () => all[at + 1], ArrowLeft: () => all[at - 1], Home: () => all[0], End: () => all[all.length - 1],
    ArrowDown: () => onNextLine(token, all, 1), ArrowUp: () => onNextLine(token, all, -1),
    Enter: () => token, " ": () => token,
  }[event.key];
  if (!target) return;
  event.preventDefault();
  const next = target();
  if (next === token) choose(token);
  else if (next) next.focus();
}

// The most and the least helpful thoughts

function excerptLink(excerpt) {
  const link = element("a");
  link.href = `#t${excerpt.text}-${excerpt.token}`;
  link.addEventListener("click", (event) => {
    event.preventDefault();
    jump(tokenAt(excerpt.text, excerpt.token));
  });
  const words = add(element("span", "quote"), element("span", "soft", visible(excerpt.context)),
    element("bdi", "thought", visible(excerpt.thought)), element("span", "", visible(excerpt.next)));
  return add(link, element("span", "gain " + shade(excerpt.gain), signed(excerpt.gain)), words);
}

function showExtremes() {
  for (const [excerpts, title, none] of [
    [data.helped, "Most helpful thoughts", "No thought helped."],
    [data.hurt, "Least helpful thoughts", "No thought hurt."],
  ]) {
    const list = element("ol");
    for (const excerpt of excerpts) list.append(add(element("li"), excerptLink(excerpt)));
    const column = add(element("div"), element("h2", "", title), excerpts.length ? list : element("p", "soft", none));
    document.getElementById("extremes").append(column);
  }
}

showLegend();
showTexts();
showExtremes();
choose(null);
document.addEventListener("keydown", onKey);
texts.addEventListener("focusin", (event) => event.target.closest(".thinks") && choose(event.target));
// moves only: a page that scrolls below a resting pointer must not take the details away from the focus
document.addEventListener("pointermove", (event) => {
  const moved = `${event.screenX} ${event.screenY}`;
  const token = event.target.closest(".thinks");
  if (moved === pointer) return;
  pointer = moved;
  if (!token || token === hovered) return;
  hovered = token;
  showDetails(token);
});
texts.addEventListener("pointerleave", () => {
  hovered = null;
  showDetails(chosen);
});
const linked = /^#t\d+-\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
if (linked) jump(linked);
