// A page from disk may not load modules: then this alone runs, and says what to do.
if (location.protocol === "file:") {
  const status = document.getElementById("status");
  document.body.dataset.state = "error";
  status.className = "error";
  status.textContent = "Open this page from a server: run “python -m http.server” in its folder and go to http://localhost:8000";
}
