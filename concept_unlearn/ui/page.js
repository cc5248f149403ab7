// A token that is clicked, or entered on, is told to the server, which says what is known of it.
(() => {
  const tell = (event) => {
    const token = event.target.closest?.("[data-token]");
    if (!token) return;
    document.querySelectorAll("[data-token].chosen").forEach((other) => other.classList.remove("chosen"));
    token.classList.add("chosen");
    emitEvent("token", token.dataset.token);
  };
  document.addEventListener("click", tell);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      if (event.target.dataset?.token) { event.preventDefault(); tell(event); }
    }
  });
})();
