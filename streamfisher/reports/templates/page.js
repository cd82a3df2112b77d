"use strict";
// Tables sort by a click on a column; curves say their values under the pointer and can be switched off. No network.
for (const table of document.querySelectorAll("table.metrics")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending" && column > 0 || head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => column ? (parseFloat(key(a)) || 0) - (parseFloat(key(b)) || 0)
        : key(a).localeCompare(key(b), undefined, {numeric: true});
      body.append(...[...body.rows].sort((a, b) => down ? -order(a, b) : order(a, b)));
    });
  });
}
for (const svg of document.querySelectorAll("svg[data-plot]")) {
  const figure = svg.closest("figure"), plot = JSON.parse(svg.dataset.plot);
  const value = (axis, at) => {
    const [start, end, low, high, log] = plot[axis], part = (at - start) / (end - start);
    return log ? 10 ** (Math.log10(low) + part * (Math.log10(high) - Math.log10(low))) : low + part * (high - low);
  };
  const curves = plot.curves.map(([id, faint, name]) => {
    const group = document.getElementById(id), path = group.querySelector("path").getAttribute("d");
    const points = [...path.matchAll(/[ML] ?(-?[\d.]+) (-?[\d.]+)/g)].map(found => [+found[1], +found[2]]);
    return {name, points, parts: [group, document.getElementById(faint)].filter(part => part), shown: true};
  });
  const bar = document.createElement("div"), tip = document.createElement("div");
  bar.className = "toggles"; tip.className = "tip"; tip.hidden = true;
  const set = (curve, shown) => {
    curve.shown = shown;
    curve.button.setAttribute("aria-pressed", shown);
    for (const part of curve.parts) part.style.display = shown ? "" : "none";
  };
  for (const curve of curves) {
    curve.button = document.createElement("button");
    curve.button.textContent = curve.name;
    curve.button.setAttribute("aria-pressed", true);
    curve.button.addEventListener("click", () => set(curve, !curve.shown));
    bar.append(curve.button);
  }
  if (curves.length > 2) {
    const all = document.createElement("button");
    all.textContent = "all or none";
    all.addEventListener("click", () => { const shown = curves.some(c => !c.shown); curves.forEach(c => set(c, shown)); });
    bar.append(all);
  }
  if (curves.length > 1) svg.after(bar);
  figure.append(tip);
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null, least = 400;
    for (const curve of curves) if (curve.shown) for (const point of curve.points) {
      const far = (point[0] - at.x) ** 2 + (point[1] - at.y) ** 2;
      if (far < least) { least = far; best = [curve, point]; }
    }
    tip.hidden = !best;
    if (!best) return;
    const [x, y] = [value("x", best[1][0]), value("y", best[1][1])];
    tip.textContent = `${best[0].name}, ${Math.round(x)}: ${y.toPrecision(3)}`;
    const box = figure.getBoundingClientRect();
    tip.style.left = `${Math.min(event.clientX - box.left + 12, box.width - tip.offsetWidth)}px`;
    tip.style.top = `${event.clientY - box.top - 26}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
for (const figure of document.querySelectorAll("figure.samples")) {
  const dots = [...figure.querySelectorAll("circle")], bar = document.createElement("div");
  const loadings = dots.map(dot => dot.dataset.loadings.split(" ").map(Number));
  const eigenvalues = figure.dataset.eigenvalues.split(" "), chosen = [0, Math.min(1, eigenvalues.length - 1)];
  bar.className = "toggles";
  ["across", "up"].forEach((word, axis) => {
    const label = document.createElement("label"), select = document.createElement("select");
    eigenvalues.forEach((value, k) => select.add(new Option(`eigenvector ${k + 1} (${value})`, k, false, k === chosen[axis])));
    select.addEventListener("change", () => {
      const k = chosen[axis] = Number(select.value), most = Math.max(...loadings.map(row => Math.abs(row[k]))) || 1;
      dots.forEach((dot, i) => {
        const at = loadings[i][k] / most;
        dot.setAttribute(axis ? "cy" : "cx", (axis ? 150 - 135 * at : 200 + 180 * at).toFixed(1));
      });
    });
    label.append(`${word}: `, select);
    bar.append(label);
  });
  if (eigenvalues.length > 1) figure.querySelector("svg").after(bar);
}
