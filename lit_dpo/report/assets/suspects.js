"use strict";
{
  const cards = [...document.querySelectorAll("article.suspect")];
  const key = `lit_dpo suspects ${content.num_pairs} ${content.suspects.map((one) => `${one.source}:${one.row}`).join()}`;
  const count = document.getElementById("count");
  const action = (card) => card.querySelector("input:checked").value;
  const choose = (card, value) => { card.querySelector(`input[value="${value}"]`).checked = true; };
  const decisions = () => cards.map((card, n) => ({ source: content.suspects[n].source, row: content.suspects[n].row, action: action(card) }));
  // A page from a file may have no storage: then the choices live as long as the page.
  const stored = () => { try { return JSON.parse(localStorage.getItem(key)) || []; } catch { return []; } };
  const changed = () => {
    const made = cards.map(action);
    cards.forEach((card, n) => { card.dataset.action = made[n]; });
    count.textContent = `${made.filter((one) => one === "flip").length} flipped, ${made.filter((one) => one === "drop").length} dropped`;
    try { localStorage.setItem(key, JSON.stringify(made)); } catch { /* no storage */ }
  };
  stored().forEach((value, n) => { if (cards[n] && ["keep", "flip", "drop"].includes(value)) choose(cards[n], value); });
  document.addEventListener("change", changed);
  document.addEventListener("keydown", (event) => {
    const card = event.target.closest?.("article.suspect");
    if (!card || event.ctrlKey || event.metaKey || event.altKey) return;
    const value = { k: "keep", f: "flip", d: "drop" }[event.key];
    if (value) choose(card, value);
    else if (event.key === "n" || event.key === "p") {
      const next = cards[cards.indexOf(card) + (event.key === "n" ? 1 : -1)];
      if (next) { next.focus({ preventScroll: true }); next.scrollIntoView({ block: "start" }); }
    } else return;
    event.preventDefault();
    changed();
  });
  const save = (name, lines) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.map((line) => JSON.stringify(line) + "\n").join("")], { type: "application/jsonl" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const cleaned = () => {
    const made = new Map(decisions().map((one) => [`${one.source}\n${one.row}`, one.action]));
    return content.pairs.flatMap(({ source, row, ...pair }) => {
      const decided = made.get(`${source}\n${row}`) || "keep";
      if (decided === "drop") return [];
      if (decided === "keep") return [pair];
      // The scores contradict a flipped label.
      const rest = Object.fromEntries(Object.entries(pair).filter(([name]) => !name.startsWith("score_")));
      return [{ ...rest, chosen: pair.rejected, rejected: pair.chosen }];
    });
  };
  document.getElementById("save").addEventListener("click", () => content.pairs ? save("cleaned.jsonl", cleaned()) : save("decisions.jsonl", decisions()));
  document.getElementById("decisions")?.addEventListener("click", () => save("decisions.jsonl", decisions()));
  changed();
}
