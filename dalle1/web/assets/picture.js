// The picture to complete: chosen, dropped or pasted; it travels as a data URL in `props.value`.
// Runs once, with Gradio's `element`, `props` and `trigger`.

const most = Number(props.most);

const say = (text) => {
  element.querySelector(".d1-said").textContent = text;
};

const take = (file) => {
  if (!file) return;
  if (file.size > most) {
    const megabytes = (count) => (count / 2 ** 20).toFixed(1) + " MB";
    say("picture: expected at most " + megabytes(most) + ", got " + megabytes(file.size));
    return;
  }
  const reader = new FileReader();
  reader.onerror = () => say("picture: the browser cannot read this file");
  reader.onload = () => {
    say("");
    props.value = reader.result;
    trigger("upload");
  };
  reader.readAsDataURL(file);
};

element.addEventListener("change", (event) => {
  if (event.target.type !== "file") return;
  take(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
element.addEventListener("click", (event) => {
  if (!event.target.closest(".d1-remove")) return;
  event.preventDefault();
  say("");
  props.value = "";
  trigger("clear");
});
for (const name of ["dragover", "drop"])
  element.addEventListener(name, (event) => {
    event.preventDefault();
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (files.length && element.offsetParent) take(files[0]);
});
