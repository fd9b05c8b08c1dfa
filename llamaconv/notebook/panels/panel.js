// Gives screen readers what ipywidgets leaves out: names of sliders, and a line that is read aloud.
((still) => {
  const area = still?.closest(".jp-OutputArea");
  if (!area || area.dataset.llamaconvNamed) return;
  area.dataset.llamaconvNamed = "yes";
  const name = () => {
    for (const slider of area.querySelectorAll(".llamaconv-live .widget-slider")) {
      const label = slider.querySelector(".widget-label")?.textContent ?? "";
      slider.querySelector(".noUi-handle")?.setAttribute("aria-label", label);
      slider.querySelector(".widget-readout")?.setAttribute("aria-label", `${label}, as a number`);
    }
    for (const line of area.querySelectorAll(".llamaconv-said .widget-html-content")) {
      line.setAttribute("role", "status");
      line.setAttribute("aria-live", "polite");
    }
  };
  new MutationObserver(name).observe(area, { childList: true, subtree: true });
  name();
})(document.currentScript?.parentElement);
