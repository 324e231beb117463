"use strict";
for (const box of document.querySelectorAll("[data-slider]")) {
  const input = box.querySelector("input");
  const move = () => box.style.setProperty("--share", input.value + "%");
  input.addEventListener("input", move);
  move();
}
for (const group of document.querySelectorAll("[data-samples]")) {
  const media = () => [...group.querySelectorAll("video, audio")].filter((one) => !one.closest("[hidden]"));
  const button = group.querySelector("[data-play]");
  const stop = () => {
    for (const one of group.querySelectorAll("video, audio")) one.pause();
    if (button) button.textContent = "Play all";
  };
  group.querySelector("[data-choose]").addEventListener("change", (event) => {
    stop();
    for (const one of group.querySelectorAll("[data-way]")) one.hidden = one.dataset.way !== event.target.value;
  });
  if (button) {
    button.addEventListener("click", () => {
      if (button.textContent !== "Play all") return stop();
      for (const one of media()) {
        one.currentTime = 0;
        if (one.tagName === "VIDEO") one.play();
      }
      const sounds = media().filter((one) => one.tagName === "AUDIO");
      sounds.forEach((one, i) => (one.onended = () => (sounds[i + 1] ? sounds[i + 1].play() : stop())));
      if (sounds.length) sounds[0].play();
      button.textContent = "Stop";
    });
  }
}
const tip = document.getElementById("tip");
let told = null;
const place = () => {
  if (!told) return;
  const at = told.getBoundingClientRect();
  const left = Math.min(at.left + 12, innerWidth - tip.offsetWidth - 8);
  tip.style.left = Math.max(8, left) + "px";
  const above = at.top - tip.offsetHeight - 8;
  tip.style.top = (above > 4 ? above : at.bottom + 8) + "px";
};
const show = (event) => {
  told = event.currentTarget;
  tip.textContent = told.dataset.tip;
  tip.hidden = false;
  place();
};
const hide = () => {
  told = null;
  tip.hidden = true;
};
for (const point of document.querySelectorAll("[data-tip]")) {
  for (const name of ["mouseenter", "focus", "click"]) point.addEventListener(name, show);
  for (const name of ["mouseleave", "blur"]) point.addEventListener(name, hide);
}
addEventListener("keydown", (event) => event.key === "Escape" && hide());
addEventListener("scroll", place, { passive: true, capture: true });
