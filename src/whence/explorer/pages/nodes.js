// Nodes of the page. Data reaches the document as text nodes only, never as markup, and never as the target of a link.

export const byId = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  return furnish(node, attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return furnish(node, attributes, children);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function button(label, act, attributes = {}) {
  const node = el("button", { type: "button", ...attributes }, label);
  node.addEventListener("click", act);
  return node;
}

// A button that is on or off.
export function toggle(label, isOn, act, attributes = {}) {
  return button(label, act, { "aria-pressed": String(isOn), ...attributes });
}

// The children of `parent` become `nodes`, in this order. Nodes that stay are not touched, so that neither the focus
// nor the place of a scrolled text is lost.
export function arrange(parent, nodes) {
  const focusAgain = anchor(document.activeElement);
  const staying = new Set(nodes);
  for (const child of [...parent.childNodes]) if (!staying.has(child)) child.remove();
  nodes.forEach((node, place) => {
    const there = parent.childNodes[place];
    if (there !== node) parent.insertBefore(node, there ?? null);
  });
  if (document.activeElement === document.body) focusAgain();
}

const isFocusable = (node) => !node.disabled && node.tabIndex >= 0 && node.checkVisibility();

// Remembers where `node` is. The function that it returns focuses it or, if it has left the page since, the like of it
// in what took its place.
export function anchor(node) {
  const path = [];
  for (let at = node; at?.parentNode; at = at.parentNode) path.push([at, [...at.parentNode.children].indexOf(at)]);
  return () => {
    const depth = path.findIndex(([at]) => at.isConnected);
    if (depth === 0) return node.focus({ preventScroll: true });
    for (let above = depth; above > 0 && above < path.length; above++) {
      const [nearest] = path[above];
      const heir = nearest.children?.[path[above - 1][1]] ?? nearest.lastElementChild ?? nearest;
      const likes = [...heir.querySelectorAll("button, input, select, textarea, [tabindex]")].filter(isFocusable);
      const like = likes.find((each) => each.className === node.className) ?? likes[0];
      if (like) return like.focus({ preventScroll: true });
    }
  };
}

// The same buttons drawn again: the focus goes to the one with the same key.
export function redraw(parent, ...nodes) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  parent.replaceChildren(...nodes.flat().filter(Boolean));
  if (focused) parent.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

// A choice of one among few: [[value, label], ...].
export function choice(name, options, chosen, act, attributes = {}) {
  const select = el("select", { "aria-label": name, ...attributes });
  for (const [value, label, isOff] of options)
    select.append(el("option", { value, selected: value === chosen, disabled: isOff }, label));
  select.addEventListener("change", () => act(select.value));
  return select;
}

// A field of text as high as what is typed in it.
export function fit(field) {
  field.style.height = "auto";
  if (field.scrollHeight) field.style.height = `${field.scrollHeight + 2}px`;
}

// Scrolls the parent alone, never the page, until the node is seen.
export function reveal(node) {
  const [inner, outer] = [node.getBoundingClientRect(), node.parentNode.getBoundingClientRect()];
  if (inner.top < outer.top) node.parentNode.scrollTop += inner.top - outer.top;
  if (inner.bottom > outer.bottom) node.parentNode.scrollTop += inner.bottom - outer.bottom;
}

// Said once by screen readers; `words` are whole sentences.
export function announce(words) {
  byId("announcer").textContent = words;
}

// One line in the place where something failed, with a way to try again.
export function problemLine(problem, retry = null) {
  const words = el("span", { dir: "auto" }, problem.message);
  return el("p", { class: "problem", role: "alert" }, words, retry && button("Try again", retry, { class: "quiet" }));
}

export async function copyText(text, source) {
  const label = source.textContent;
  try {
    await navigator.clipboard.writeText(text);
    source.textContent = "Copied";
    announce("The text is copied.");
  } catch {
    source.textContent = "Press Ctrl+C";
    const shown = source.closest(".copy")?.querySelector("input, pre");
    if (shown?.select) shown.select();
    else if (shown) getSelection().selectAllChildren(shown);
  }
  setTimeout(() => (source.textContent = label), 1600);
}
