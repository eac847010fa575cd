// Counts down the time until a request expires. Everything else works without this script. The time of the server is in the page,
// so a wrong clock of this computer does not matter.
"use strict";

const header = document.querySelector("[data-now]");
const serverStart = Number(header.dataset.now);
const start = performance.now();

function remaining(until) {
  return until - serverStart - (performance.now() - start) / 1000;
}

function describe(seconds) {
  if (seconds <= 0) return "(expired)";
  if (seconds < 60) return `(${Math.ceil(seconds)} s left)`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 120) return `(${minutes} min left)`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `(${hours} h left)` : `(${Math.floor(hours / 24)} days left)`;
}

function update() {
  for (const span of document.querySelectorAll("[data-expires]")) {
    const text = describe(remaining(Number(span.dataset.expires)));
    if (span.textContent !== text) span.textContent = text;
  }
  for (const form of document.querySelectorAll("[data-until]")) {
    if (remaining(Number(form.dataset.until)) > 0) continue;
    form.querySelector("fieldset").disabled = true;
    form.querySelector(".over").hidden = false;
  }
}

update();
setInterval(update, 1000);
