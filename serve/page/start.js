// The picture to begin with: chosen, dropped, pasted, or one of the gallery's.

const MOST_SIDE = 2048;
const PLAIN = ["image/png", "image/jpeg", "image/webp"];
const $ = (id) => document.getElementById(id);

const asDataUrl = (blob) => new Promise((done, fail) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.onerror = () => fail(reader.error);
  reader.readAsDataURL(blob);
});

/** A picture of a kind and a size that the server takes: what is larger is made smaller here already. */
async function prepare(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name ? `“${file.name}”` : "That"} is not a picture that this browser can open.`);
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, MOST_SIDE / Math.max(width, height));
  if (scale === 1 && PLAIN.includes(file.type)) return { blob: file, width, height };
  const canvas = Object.assign(document.createElement("canvas"), {
    width: Math.round(width * scale),
    height: Math.round(height * scale),
  });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  return { blob, width: canvas.width, height: canvas.height };
}

/** Tells of a "change", and of a "problem" with a message. */
export class Start extends EventTarget {
  /** { image, url, width, height, name }: the data URL to send and the address to show; null if there is none. */
  chosen = null;

  constructor() {
    super();
    $("start-choose").addEventListener("click", () => $("start-file").click());
    $("start-file").addEventListener("change", () => {
      if ($("start-file").files.length) this.take($("start-file").files[0]);
      $("start-file").value = "";
    });
    $("start-remove").addEventListener("click", () => {
      this.choose(null);
      $("start-choose").focus();
    });
    this.#catchDrops();
    addEventListener("paste", (event) => {
      const file = [...event.clipboardData?.files ?? []].find(({ type }) => type.startsWith("image/"));
      if (file) this.take(file);
    });
  }

  /** Begin with a file or blob. */
  async take(file, name = file.name) {
    try {
      const { blob, width, height } = await prepare(file);
      const image = await asDataUrl(blob);
      this.choose({ image, url: URL.createObjectURL(blob), width, height, name: name || "A picture" });
    } catch (cause) {
      this.dispatchEvent(new CustomEvent("problem", { detail: cause.message }));
    }
  }

  /** Begin with one that was chosen before, or with none. */
  choose(chosen) {
    this.chosen = chosen;
    const there = chosen !== null;
    $("start-image").hidden = !there;
    if (there) $("start-image").src = chosen.url;
    else $("start-image").removeAttribute("src");
    $("start-image").alt = there ? "The picture to begin with" : "";
    $("start-name").textContent = there ? `${chosen.name}, ${chosen.width} × ${chosen.height}` : "Drop, paste, or";
    $("start-choose").textContent = there ? "Another" : "Choose a picture";
    $("start-remove").hidden = $("strength-field").hidden = !there;
    this.dispatchEvent(new Event("change"));
  }

  /** Drops count anywhere in the window; a curtain says so while one hovers. */
  #catchDrops() {
    const holdsFile = (event) => [...event.dataTransfer?.types ?? []].includes("Files");
    addEventListener("dragover", (event) => {
      if (!holdsFile(event)) return;
      event.preventDefault();
      $("curtain").hidden = false;
    });
    addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) $("curtain").hidden = true;
    });
    addEventListener("drop", (event) => {
      $("curtain").hidden = true;
      if (!holdsFile(event)) return;
      event.preventDefault();
      if (event.dataTransfer.files.length) this.take(event.dataTransfer.files[0]);
    });
  }
}
