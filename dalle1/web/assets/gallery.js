// The complete images: best of the first n candidates, a closer look, downloads, continuing.
// Runs once, with Gradio's `element` and `trigger`; the content of `element` comes and goes.

const rank = (section, first) => {
  const keep = Number(section.dataset.keep);
  const tiles = [...section.querySelectorAll(".d1-tile")];
  const shown = tiles
    .filter((tile) => Number(tile.dataset.number) < first)
    .sort((a, b) => b.dataset.score - a.dataset.score || a.dataset.number - b.dataset.number)
    .slice(0, keep);
  for (const tile of tiles) {
    const place = shown.indexOf(tile);
    tile.hidden = place < 0;
    if (place >= 0) {
      tile.style.order = place;
      tile.querySelector(".d1-rank").textContent = place + 1;
    }
  }
  section.querySelector(".d1-count").textContent = "the best " + shown.length + " of " + first;
};

const look = (image) => {
  let dialog = document.querySelector("dialog.d1-dialog");
  if (!dialog) {
    dialog = document.createElement("dialog");
    dialog.className = "d1-dialog";
    dialog.append(document.createElement("img"));
    dialog.addEventListener("click", () => dialog.close());
    document.body.append(dialog);
  }
  const copy = dialog.firstChild;
  copy.src = image.src;
  copy.alt = image.alt;
  copy.className = image.closest(".d1-pixels") ? "d1-pixels" : "";
  dialog.showModal();
};

element.addEventListener("input", (event) => {
  if (!event.target.matches(".d1-first")) return;
  const first = Number(event.target.value);
  // As an attribute, too: new content of the page is compared with attributes.
  event.target.setAttribute("value", first);
  event.target.closest("label").querySelector("output").textContent = first;
  rank(event.target.closest(".d1-caption"), first);
});

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  const tile = button && button.closest(".d1-tile");
  if (!tile) return;
  const image = tile.querySelector("img");
  if (button.matches(".d1-look")) look(image);
  if (button.matches(".d1-use")) trigger("select", { picture: image.src });
  if (button.matches(".d1-save")) {
    const link = document.createElement("a");
    link.href = image.src;
    link.download = button.dataset.name;
    link.click();
  }
});
