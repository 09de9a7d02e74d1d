// What a reader would trip over, as a list of sentences: texts that overlap, leave the page, are cut, or are
// too pale for their ground (WCAG 2.1, 4.5 to 1).
(() => {
  document.querySelectorAll("details").forEach((one) => (one.open = true));
  const faults = [], texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const gone = (element) => element && (getComputedStyle(element).display === "none" || gone(element.parentElement)); // svg texts keep their boxes
  const short = (text) => text.trim().replace(/\s+/g, " ").slice(0, 40);
  for (let node; (node = walker.nextNode()); ) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("title, style") || !parent.checkVisibility({ visibilityProperty: true }) || gone(parent)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects())
      if (box.width > 1 && box.height > 1) texts.push({ box, parent, text: short(node.data), scrolls: !!parent.closest(".scroll") });
  }
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) faults.push(`the page is ${document.documentElement.scrollWidth} wide, not ${width}`);
  for (const { box, text, scrolls } of texts)
    if (!scrolls && (box.left < -1 || box.right > width + 1)) faults.push(`"${text}" leaves the page`);
  const hidden = (box) => box.right > width || box.left < 0; // scrolled out of sight
  texts.sort((a, b) => a.box.top - b.box.top);
  texts.forEach((one, i) => {
    for (let j = i + 1; j < texts.length && texts[j].box.top < one.box.bottom - 3; j++) {
      const other = texts[j], a = one.box, b = other.box;
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left), high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 2 && high > 4 && !hidden(a) && !hidden(b)) faults.push(`"${one.text}" and "${other.text}" overlap`);
    }
  });
  for (const one of document.querySelectorAll("body *")) {
    const style = getComputedStyle(one);
    if (style.overflowX === "hidden" && one.scrollWidth > one.clientWidth + 1 && one.textContent.trim()) faults.push(`"${short(one.textContent)}" is cut`);
  }
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = numbers(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const pale = new Set();
  for (const { parent, text } of texts) {
    if (parent.closest("svg")) continue;
    const [one, other] = [light(numbers(getComputedStyle(parent).color)), light(ground(parent))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5 && !pale.has(parent.className + ratio)) {
      pale.add(parent.className + ratio);
      faults.push(`"${text}" has a contrast of ${ratio.toFixed(1)}`);
    }
  }
  return faults.slice(0, 20);
})();
