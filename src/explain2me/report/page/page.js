"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const shown = (value) => (value === null || value === undefined ? "-" : value.toFixed(3));
  const fill = (select, options) => options.forEach(([value, text]) => select.append(make("option", text, { value })));

  // a button that is disabled while it has the focus would swallow the arrow keys
  const able = (button, can) => button.setAttribute("aria-disabled", String(!can));

  // ---------------------------------------------------------------- viewer
  const byImage = new Map(data.shown.map((item) => [item.image, item]));
  const names = new Map(data.columns.map((column) => [column.key, column.name]));
  const groups = new Map([["all", [...byImage.keys()]]]);
  for (const item of data.telling) {
    const key = `${item.score}|${item.why}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(item.image);
  }
  const inWords = (key) => {
    const [score, why] = key.split("|");
    return score ? `${names.get(score)}: ${why}` : why;
  };
  fill($("viewer-why"), [...groups.keys()].map((key) => [key, key === "all" ? "any reason" : inWords(key)]));
  fill($("viewer-condition"), data.conditions.map((name, i) => [String(i), name]));
  const state = { position: 0, condition: 0, images: groups.get("all") };

  const overlay = (picture, cells, size, label) => {
    const canvas = make("canvas", null, { role: "img", "aria-label": label, width: "152", height: "152" });
    const context = canvas.getContext("2d");
    const live = cells.some((value) => value > 0);
    const small = document.createElement("canvas");
    [small.height, small.width] = size;
    const pixels = small.getContext("2d").createImageData(size[1], size[0]);
    cells.forEach((value, i) => {
      const step = Math.min(31, Math.max(0, Math.round(((value - 1) / 254) * 31)));
      for (let c = 0; c < 3; c += 1) pixels.data[4 * i + c] = data.palette[3 * step + c];
      pixels.data[4 * i + 3] = 255;
    });
    small.getContext("2d").putImageData(pixels, 0, 0);
    const draw = (image) => {
      if (image) context.drawImage(image, 0, 0, canvas.width, canvas.height);
      if (!live) return;
      context.globalAlpha = image ? 0.55 : 1;
      context.imageSmoothingQuality = "high";
      context.drawImage(small, 0, 0, canvas.width, canvas.height);
    };
    if (picture) {
      const image = new Image();
      image.onload = () => draw(image);
      image.src = picture;
    } else draw(null);
    return [canvas, live];
  };

  const place = (cells, size) => {
    const best = cells.indexOf(Math.max(...cells));
    return `peak in row ${Math.floor(best / size[1]) + 1} of ${size[0]}, column ${(best % size[1]) + 1} of ${size[1]}`;
  };

  const view = () => {
    const box = $("viewer-maps");
    box.replaceChildren();
    if (!state.images.length) {
      $("viewer-status").textContent = "There is no image to show.";
      return;
    }
    const number = state.images[state.position];
    const item = byImage.get(number);
    const id = item.id;
    const reasons = data.telling.filter((one) => one.image === number).map((one) => inWords(`${one.score}|${one.why}`));
    $("viewer-status").textContent =
      `Image ${state.position + 1} of ${state.images.length}: ${id} (${item.label}, ${item.source}). ` +
      `${reasons.join("; ")}. Condition: ${data.conditions[state.condition]}.`;
    const first = make("figure");
    if (item.picture) first.append(make("img", null, { src: item.picture, alt: `the image ${id}` }));
    else first.append(make("p", "The file of this image no longer exists."));
    first.append(make("figcaption", "the image"));
    box.append(first);
    item.maps.forEach((runs, d) => {
      runs.forEach((one, r) => {
        if (!one || (r > 0 && state.condition > 0)) return;
        const all = Uint8Array.from(atob(one.cells), (c) => c.charCodeAt(0));
        const count = one.size[0] * one.size[1];
        const cells = [...all.subarray(state.condition * count, (state.condition + 1) * count)];
        const description = `${data.detectors[d]}, run ${one.run}: ${cells.some((v) => v > 0) ? place(cells, one.size) : "dead map"}`;
        const [canvas, live] = overlay(item.picture, cells, one.size, description);
        const figure = make("figure");
        const predicted = data.classes[one.predicted[state.condition]] ?? "-";
        figure.append(canvas);
        figure.append(make("figcaption", `${data.detectors[d]}, ${one.run}: predicts ${predicted}${live ? "" : ", dead map"}`));
        box.append(figure);
      });
    });
    $("viewer-condition").value = String(state.condition);
    able($("viewer-previous"), state.position > 0);
    able($("viewer-next"), state.position < state.images.length - 1);
  };
  const move = (images, conditions) => {
    state.position = Math.min(state.images.length - 1, Math.max(0, state.position + images));
    state.condition = Math.min(data.conditions.length - 1, Math.max(0, state.condition + conditions));
    view();
  };
  const go = (number) => {
    $("viewer-why").value = "all";
    state.images = groups.get("all");
    state.position = state.images.indexOf(number);
    view();
    $("viewer").focus();
    $("viewer").scrollIntoView({ block: "start" });
  };
  $("viewer").addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!steps || ["SELECT", "INPUT"].includes(event.target.tagName)) return;
    event.preventDefault();
    move(...steps);
  });
  $("viewer-previous").addEventListener("click", () => move(-1, 0));
  $("viewer-next").addEventListener("click", () => move(1, 0));
  $("viewer-condition").addEventListener("change", (event) => {
    state.condition = Number(event.target.value);
    view();
  });
  $("viewer-why").addEventListener("change", (event) => {
    state.images = groups.get(event.target.value);
    state.position = 0;
    view();
  });

  // ---------------------------------------------------------------- table
  const perPage = 20;
  const listing = { sort: 0, down: false, page: 0, detector: 0, rows: [] };
  const columns = [
    { name: "image", of: (i) => data.images.id[i] },
    { name: "label", of: (i) => data.images.label[i] },
    { name: "source", of: (i) => data.images.source[i] },
    { name: "decision", of: (i, v) => data.classes[v.predicted[i]] ?? "-" },
    { name: `probability of ${data.probable}`, of: (i, v) => v.probability[i], number: true },
    ...data.columns.map((column, k) => ({ name: column.name, of: (i, v) => v.scores[k][i], number: true })),
    { name: "decisions kept", of: (i, v) => v.kept[i], number: true },
    { name: "runs with a dead map", of: (i, v) => v.dead[i], number: true, whole: true },
  ];
  fill($("table-detector"), data.detectors.map((name, i) => [String(i), name]));
  const heads = columns.map((column, k) => {
    const head = make("th", null, { scope: "col" });
    if (column.number) head.className = "n";
    const button = make("button", column.name, { type: "button" });
    button.addEventListener("click", () => {
      listing.down = listing.sort === k ? !listing.down : Boolean(column.number);
      listing.sort = k;
      select();
    });
    head.append(button);
    return head;
  });
  const line = document.createElement("tr");
  line.append(...heads);
  $("table").tHead.append(line);

  const select = () => {
    const values = data.values[listing.detector];
    const text = $("table-find").value.trim().toLowerCase();
    const matches = {
      all: () => true,
      wrong: (i) => data.labelled && data.images.label[i] !== (data.classes[values.predicted[i]] ?? "-"),
      flipped: (i) => values.kept[i] !== null && values.kept[i] < 1,
      dead: (i) => values.dead[i] > 0,
    }[$("table-which").value];
    const rows = [];
    for (let i = 0; i < data.images.id.length; i += 1) {
      const words = `${data.images.id[i]} ${data.images.label[i]} ${data.images.source[i]}`.toLowerCase();
      if (words.includes(text) && matches(i)) rows.push(i);
    }
    const { of } = columns[listing.sort];
    const sign = listing.down ? -1 : 1;
    const keys = new Map(rows.map((i) => [i, of(i, values)]));
    rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (sign * (x < y ? -1 : x > y ? 1 : 0)) || a - b;
    });
    listing.rows = rows;
    listing.page = 0;
    heads.forEach((head, k) => {
      if (k === listing.sort) head.setAttribute("aria-sort", listing.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    page();
  };
  const page = () => {
    const values = data.values[listing.detector];
    const pages = Math.max(1, Math.ceil(listing.rows.length / perPage));
    const some = listing.rows.slice(listing.page * perPage, (listing.page + 1) * perPage);
    const body = $("table").tBodies[0];
    body.replaceChildren(
      ...some.map((i) => {
        const row = document.createElement("tr");
        columns.forEach((column, k) => {
          const value = column.of(i, values);
          const cell = make(k === 0 ? "th" : "td", column.number && !column.whole ? shown(value) : value);
          if (k === 0) cell.setAttribute("scope", "row");
          if (column.number) cell.className = "n";
          if (k === 0 && byImage.has(i)) {
            cell.textContent = "";
            const button = make("button", value, { type: "button", title: "Show in the viewer" });
            button.addEventListener("click", () => go(i));
            cell.append(button);
          }
          row.append(cell);
        });
        return row;
      }),
    );
    $("table-status").textContent =
      `${listing.rows.length} of ${data.images.id.length} images, page ${listing.page + 1} of ${pages}. ` +
      "Names that are buttons open in the viewer.";
    able($("table-previous"), listing.page > 0);
    able($("table-next"), listing.page < pages - 1);
  };
  $("table-detector").addEventListener("change", (event) => {
    listing.detector = Number(event.target.value);
    select();
  });
  $("table-find").addEventListener("input", select);
  $("table-which").addEventListener("change", select);
  const turn = (pages) => {
    const last = Math.max(0, Math.ceil(listing.rows.length / perPage) - 1);
    listing.page = Math.min(last, Math.max(0, listing.page + pages));
    page();
  };
  $("table-previous").addEventListener("click", () => turn(-1));
  $("table-next").addEventListener("click", () => turn(1));
  if (!data.labelled) $("table-which").querySelector("[value=wrong]").remove();
  view();
  select();
})();
