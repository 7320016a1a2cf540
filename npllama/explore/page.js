"use strict";
(() => {
  // A map of values: its image contains them as float16; the value under the pointer is shown.
  const half = (bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  };
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const show = (event, image) => {
    const box = image.getBoundingClientRect();
    const [rows, columns] = image.dataset.shape.split(" ").map(Number);
    const clamp = (x, n) => Math.min(Math.max(Math.floor(x), 0), n - 1);
    const row = clamp(((event.clientY - box.top) / box.height) * rows, rows);
    const column = clamp(((event.clientX - box.left) / box.width) * columns, columns);
    const lower = image.dataset.lower !== undefined; // row i of a map with a mask ends at column i
    tip.hidden = lower && column > row;
    if (tip.hidden) return;
    image.halves ??= new DataView(bytes(image.dataset.lower ?? image.dataset.values).buffer);
    const place = lower ? (row * (row + 1)) / 2 + column : row * columns + column;
    const value = half(image.halves.getUint16(2 * place, true));
    const name = (list, i) => (list ? JSON.parse(list)[i] : i);
    tip.textContent = `${name(image.dataset.rows, row)}, ` +
      `${name(image.dataset.columns, column)}: ${Number((value * image.dataset.scale).toPrecision(3))}`;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.max(event.clientY - 34, 4)}px`;
  };
  document.addEventListener("pointermove", (event) => {
    const image = event.target.closest?.("image[data-values], image[data-lower]");
    if (image) show(event, image);
    else tip.hidden = true;
  });

  // RoPE: one hand per pair, rotated by position * theta.
  for (const control of document.querySelectorAll(".control[data-turn]")) {
    control.hidden = false;
    const slider = control.querySelector("input"), output = control.querySelector("output");
    const hands = control.closest("figure").querySelectorAll(".hand");
    const turn = () => {
      output.textContent = `position ${slider.value}`;
      for (const hand of hands) {
        const degrees = (slider.value * hand.dataset.theta * 180) / Math.PI;
        hand.setAttribute("transform", `rotate(${-degrees} ${hand.dataset.cx} ${hand.dataset.cy})`);
      }
    };
    slider.addEventListener("input", turn);
    turn();
  }

  // Sampling: the softmax of the logits at another temperature.
  for (const control of document.querySelectorAll(".control[data-logits]")) {
    control.hidden = false;
    const logits = Float32Array.from(new Int16Array(bytes(control.dataset.logits).buffer), (x) => x / 512);
    const shown = JSON.parse(control.dataset.shown), labels = JSON.parse(control.dataset.labels);
    const slider = control.querySelector("input"), output = control.querySelector("output");
    const bars = control.querySelector(".bars");
    const rows = shown.map((_id, i) => {
      const label = document.createElement("code"), track = document.createElement("div");
      const bar = document.createElement("div"), share = document.createElement("span");
      label.textContent = labels[i];
      label.className = "piece";
      bar.className = i === Number(control.dataset.chosen) ? "bar chosen" : "bar";
      track.append(bar);
      bars.append(label, track, share);
      return { bar, share };
    });
    const draw = () => {
      const t = Number(slider.value);
      let total = 0;
      for (const x of logits) total += Math.exp(x / t);
      rows.forEach(({ bar, share }, i) => {
        const p = Math.exp(logits[shown[i]] / t) / total;
        bar.style.width = `${100 * p}%`;
        share.textContent = `${(100 * p).toFixed(1)}%`;
      });
      output.textContent = `temperature ${t.toFixed(2)}`;
    };
    slider.addEventListener("input", draw);
    draw();
  }

  // Mark the section in view in the list of sections.
  const links = new Map([...document.querySelectorAll("nav li a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((a) => a.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  document.querySelectorAll("section").forEach((section) => seen.observe(section));
})();
