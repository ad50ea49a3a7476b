"use strict";

/* The theme adds a navigation with a copy button to each block of code, and makes wide tables scroll: both get a name,
   and what scrolls can be focused. */
const label = () => {
  document.querySelectorAll(".md-code__nav:not([aria-label])").forEach((nav) => {
    const number = [...document.querySelectorAll(".highlight")].indexOf(nav.closest(".highlight")) + 1;
    nav.setAttribute("aria-label", `Block of code ${number}`);
  });
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((frame, index) => {
    if (frame.tabIndex < 0) frame.tabIndex = 0;
    if (!frame.role) [frame.role, frame.ariaLabel] = ["group", `Table ${index + 1}`];
  });
};
new MutationObserver(label).observe(document.body, { childList: true, subtree: true });
label();
