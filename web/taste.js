// The questions of the node Collect Preferences (Taste), drawn on it: classic and Nodes 2.0.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "ImageReFLTaste";
const EVENT = "imagerefl.taste";
const BASE = "/imagerefl/taste";
const KEPT_IMAGES = 64;
const panels = new Set();
const images = new Map(); // URL of a blob by set and hash, the latest last

const STYLE = `
.imagerefl-taste { display: flex; flex-direction: column; gap: 6px; box-sizing: border-box; width: 100%; height: 100%; min-height: 0; padding: 6px;
  border: 1px solid var(--border-color, #444); border-radius: 6px; background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd);
  font: 12px/1.35 sans-serif; outline: none; overflow: hidden; user-select: none; pointer-events: auto; }
.imagerefl-taste:focus-within { border-color: #4a9eff; box-shadow: 0 0 0 1px #4a9eff; }
.imagerefl-taste .prompt { max-height: 2.7em; overflow: hidden; overflow-wrap: anywhere; user-select: text; flex: none; }
.imagerefl-taste .images { flex: 1 1 0; min-height: 0; display: grid; gap: 6px; }
.imagerefl-taste .images button { position: relative; min-width: 0; min-height: 0; padding: 0; border: 2px solid transparent; border-radius: 4px;
  background: #0004; cursor: pointer; overflow: hidden; }
.imagerefl-taste .images button:hover, .imagerefl-taste .images button:focus-visible { border-color: #4a9eff; outline: none; }
.imagerefl-taste .images img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.imagerefl-taste .images span { position: absolute; left: 4px; top: 4px; padding: 0 6px; border-radius: 4px; background: #000a; color: #fff; }
.imagerefl-taste .empty { margin: auto; text-align: center; color: var(--descrip-text, #999); }
.imagerefl-taste .row { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; flex: none; }
.imagerefl-taste .row button { padding: 2px 8px; border: 1px solid var(--border-color, #555); border-radius: 4px; background: var(--comfy-menu-bg, #333);
  color: inherit; font: inherit; cursor: pointer; }
.imagerefl-taste .row button:disabled { opacity: 0.4; cursor: default; }
.imagerefl-taste .gap { flex: 1; }
.imagerefl-taste .said { flex: none; min-height: 1.35em; color: var(--descrip-text, #999); }
.imagerefl-taste .said.error { color: #ff8a80; }
`;

function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
}

async function answerOf(response) {
    const body = await response.json().catch(() => ({}));
    if (!response.ok) throw Object.assign(new Error(body.error ?? `error ${response.status}`), { status: response.status });
    return body;
}

const get = async (path, values) => answerOf(await api.fetchApi(`${BASE}${path}?${new URLSearchParams(values)}`));

const post = async (path, values) =>
    answerOf(
        await api.fetchApi(`${BASE}${path}`, {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify(values),
        }),
    );

// The URL of an image; fetched with the user's header, which <img src> would not send.
function imageUrl(name, sha256) {
    const key = `${name}/${sha256}`;
    const found = images.get(key) ?? fetchImage(name, sha256, key);
    images.delete(key);
    images.set(key, found);
    for (const [old, url] of images) {
        if (images.size <= KEPT_IMAGES) break;
        images.delete(old);
        url.then(URL.revokeObjectURL, () => {});
    }
    return found;
}

async function fetchImage(name, sha256, key) {
    try {
        const response = await api.fetchApi(`${BASE}/image?${new URLSearchParams({ name, sha256 })}`);
        if (!response.ok) throw new Error(`the image cannot be read: error ${response.status}`);
        return URL.createObjectURL(await response.blob());
    } catch (error) {
        images.delete(key);
        throw error;
    }
}

async function confirmed(message) {
    const dialog = app.extensionManager?.dialog;
    if (dialog?.confirm) return await dialog.confirm({ title: "Delete choices", message, type: "delete" });
    return window.confirm(message);
}

class Panel {
    constructor(node) {
        this.node = node;
        this.state = null;
        this.busy = false;
        this.asked = 0; // the latest request: earlier answers are dropped
        this.root = element("div", "imagerefl-taste");
        this.root.tabIndex = 0;
        this.root.setAttribute("role", "group");
        this.root.setAttribute("aria-label", "Which image do you prefer?");
        this.prompt = element("div", "prompt");
        this.images = element("div", "images");
        this.said = element("div", "said");
        this.said.setAttribute("role", "status");
        this.buttons = {};
        const row = element("div", "row");
        const all = [
            ["tie", "Tie ↓", "Neither is better (↓ or space)", () => this.choose("tie")],
            ["skip", "Skip S", "No answer (S)", () => this.choose("skip")],
            ["undo", "Undo Z", "Take the last choice back (Z)", () => this.undo()],
            [],
            ["export", "Export", "Download the choices and their images as a ZIP", () => this.export()],
            ["delete", "Delete…", "Delete these choices and their images", () => this.delete()],
        ];
        for (const [key, label, title, act] of all) {
            const button = key ? element("button", "", label) : element("span", "gap");
            if (key) {
                button.type = "button";
                button.title = title;
                button.addEventListener("click", () => this.act(act));
                this.buttons[key] = button;
            }
            row.append(button);
        }
        this.root.append(this.prompt, this.images, row, this.said);
        this.root.addEventListener("keydown", (event) => this.key(event));
        this.root.addEventListener("pointerdown", (event) => {
            event.stopPropagation(); // the canvas would drag the node
            if (!event.target.closest(".row button")) this.root.focus({ preventScroll: true });
        });
        this.onSeen = () => document.visibilityState === "visible" && this.refresh();
        document.addEventListener("visibilitychange", this.onSeen);
        this.draw();
    }

    get name() {
        return String(this.node.widgets?.find((widget) => widget.name === "name")?.value ?? "");
    }

    remove() {
        panels.delete(this);
        document.removeEventListener("visibilitychange", this.onSeen);
    }

    async refresh() {
        const number = ++this.asked;
        try {
            const state = await get("", { name: this.name, client: api.clientId ?? "" });
            if (number === this.asked) this.show(state);
        } catch (error) {
            if (number !== this.asked) return;
            this.show(null);
            this.say(error.message, true);
        }
    }

    // One thing at a time; afterwards the keyboard is the panel's again, where it was before
    async act(call) {
        if (this.busy) return;
        const focused = this.root.contains(document.activeElement);
        this.busy = true;
        const number = ++this.asked;
        try {
            const state = await call();
            if (state && number === this.asked) this.show(state);
        } catch (error) {
            if (error.status === 409) await this.refresh(); // another tab was faster
            this.say(error.message, error.status !== 409);
        } finally {
            this.busy = false;
            if (focused) this.root.focus({ preventScroll: true });
        }
    }

    choose(outcome, image) {
        const question = this.state?.question;
        if (!question || (outcome === "tie" && question.kind === "thumb")) return null;
        return post("/choose", { name: this.name, id: question.id, outcome, chosen: image?.index ?? null });
    }

    // The image shown at a place, counted from 0; of a thumb 0 is dislike and 1 like
    pick(place) {
        const question = this.state?.question;
        if (!question) return null;
        if (question.kind === "thumb") return place < 2 ? this.choose(["disliked", "liked"][place]) : null;
        return question.images[place] ? this.choose("chosen", question.images[place]) : null;
    }

    undo() {
        return this.state?.last ? post("/undo", { name: this.name, undoes: this.state.last }) : null;
    }

    async export() {
        const name = this.name;
        const response = await api.fetchApi(`${BASE}/export?${new URLSearchParams({ name })}`);
        if (!response.ok) await answerOf(response);
        const link = element("a");
        link.href = URL.createObjectURL(await response.blob());
        link.download = `${name}.zip`;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
        return null;
    }

    async delete() {
        const name = this.name;
        const number = Object.values(this.state?.counts ?? {}).reduce((sum, one) => sum + one, 0);
        if (!(await confirmed(`Delete ${number} choices of "${name}", its open questions and its images? This cannot be undone.`))) return null;
        return post("/delete", { name, confirm: name });
    }

    key(event) {
        if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
        const own = event.target === this.root || event.target.closest(".images");
        const act = {
            ArrowLeft: () => this.pick(0),
            ArrowRight: () => this.pick(1),
            ArrowUp: () => this.state?.question?.kind === "thumb" && this.pick(1),
            ArrowDown: () => (this.state?.question?.kind === "thumb" ? this.pick(0) : this.choose("tie")),
            " ": own && (() => this.choose("tie")),
            s: () => this.choose("skip"),
            z: () => this.undo(),
        }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
        const place = /^[1-9]$/.test(event.key) ? Number(event.key) - 1 : null;
        const arrows = event.key === "ArrowLeft" || event.key === "ArrowRight";
        if (!act && place === null) return;
        event.preventDefault();
        event.stopPropagation(); // ComfyUI's shortcuts
        if (arrows && this.state?.question?.kind === "best") return; // which of n is a number
        this.act(place === null ? async () => (await act()) || null : async () => (await this.pick(place)) || null);
    }

    say(text, isError = false) {
        this.said.textContent = text;
        this.said.classList.toggle("error", isError);
    }

    show(state) {
        this.state = state;
        this.draw();
        this.say(this.counts());
    }

    counts() {
        const state = this.state;
        if (!state) return "";
        const words = { chosen: "chosen", liked: "liked", disliked: "disliked", tie: state.counts.tie === 1 ? "tie" : "ties", skip: "skipped" };
        const told = Object.keys(words).filter((key) => state.counts[key]).map((key) => `${state.counts[key]} ${words[key]}`);
        const damaged = state.left_out ? ` · ${state.left_out} damaged lines left out` : "";
        return `${state.open} open · ${told.join(", ") || "no choice yet"}${damaged}`;
    }

    draw() {
        const state = this.state;
        const question = state?.question;
        this.prompt.textContent = question?.prompt ?? "";
        this.prompt.title = question?.prompt ?? "";
        const thumb = question?.kind === "thumb";
        this.buttons.tie.style.display = thumb ? "none" : "";
        for (const key of ["tie", "skip"]) this.buttons[key].disabled = !question;
        this.buttons.undo.disabled = !state?.last;
        this.buttons.export.disabled = !state?.last;
        this.buttons.delete.disabled = !state || !(state.last || state.open || state.waiting);
        const shown = question ? `${this.name}/${question.id}` : "";
        if (shown && shown === this.drawn) return;
        this.drawn = shown;
        this.images.replaceChildren(...(question ? this.buttonsOf(question) : [this.empty()]));
        for (const sha256 of state?.next ?? []) imageUrl(this.name, sha256).catch(() => {});
    }

    empty() {
        const state = this.state;
        this.images.style.gridTemplate = "none";
        if (!state) return element("div", "empty", "");
        const text = state.waiting ? `${state.waiting} images wait for others of their prompt. Queue more.` : "Nothing to choose from. Queue images.";
        return element("div", "empty", text);
    }

    buttonsOf(question) {
        const thumb = question.kind === "thumb";
        const number = question.images.length;
        const columns = number <= 3 ? number : number === 4 ? 2 : Math.ceil(Math.sqrt(number));
        const rows = thumb ? "minmax(0, 1fr) auto" : `repeat(${Math.ceil(number / columns)}, minmax(0, 1fr))`;
        this.images.style.gridTemplate = `${rows} / repeat(${thumb ? 2 : columns}, minmax(0, 1fr))`;
        const made = question.images.map((image, place) => this.imageButton(image, place, thumb));
        if (!thumb) return made;
        made[0].style.gridColumn = "1 / 3";
        for (const [place, label] of [[0, "← Dislike"], [1, "Like →"]]) {
            const button = element("button", "", label);
            button.type = "button";
            button.style.padding = "4px";
            button.style.color = "inherit";
            button.addEventListener("click", () => this.act(() => this.pick(place)));
            made.push(button);
        }
        return made;
    }

    imageButton(image, place, thumb) {
        const button = element(thumb ? "div" : "button");
        button.style.position = "relative";
        const img = element("img");
        img.alt = `Image ${place + 1}`;
        img.draggable = false;
        imageUrl(this.name, image.sha256).then(
            (url) => (img.src = url),
            (error) => this.say(error.message, true),
        );
        button.append(img);
        if (thumb) return button;
        button.type = "button";
        button.setAttribute("aria-label", `Choose image ${place + 1}`);
        button.append(element("span", "", String(place + 1)));
        button.addEventListener("click", () => this.act(() => this.pick(place)));
        return button;
    }
}

app.registerExtension({
    name: "ImageReFL.Taste",

    setup() {
        document.head.append(element("style", "", STYLE));
        api.addEventListener(EVENT, ({ detail }) => {
            for (const panel of panels) if (panel.name === detail?.name) panel.refresh();
        });
        api.addEventListener("reconnected", () => panels.forEach((panel) => panel.refresh()));
    },

    nodeCreated(node) {
        if (node.comfyClass !== NODE) return;
        const panel = new Panel(node);
        panels.add(panel);
        const widget = node.addDOMWidget("choices", "imagerefl_taste", panel.root, {
            serialize: false,
            hideOnZoom: false,
            getMinHeight: () => 280,
        });
        widget.serialize = false; // saved graphs know widgets by position
        const name = node.widgets.find((one) => one.name === "name");
        const before = name?.callback;
        if (name) {
            name.callback = function (...values) {
                const given = before?.apply(this, values);
                panel.refresh();
                return given;
            };
        }
        const [configured, removed] = [node.onConfigure, node.onRemoved];
        node.onConfigure = function (...values) {
            configured?.apply(this, values);
            panel.refresh();
        };
        node.onRemoved = function (...values) {
            removed?.apply(this, values);
            panel.remove();
        };
        node.setSize?.([Math.max(node.size[0], 460), Math.max(node.size[1], 620)]);
        panel.refresh();
    },
});
