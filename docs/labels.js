"use strict";

/* The theme adds a navigation with a copy button to each block of code; each gets a name of its own. */
const label = () =>
  document.querySelectorAll(".md-code__nav:not([aria-label])").forEach((nav) => {
    const number = [...document.querySelectorAll(".highlight")].indexOf(nav.closest(".highlight")) + 1;
    nav.setAttribute("aria-label", `Block of code ${number}`);
  });
new MutationObserver(label).observe(document.body, { childList: true, subtree: true });
label();
