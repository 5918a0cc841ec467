// Filters the questions. Without it the page shows them all.
const form = document.querySelector("form");
const plain = (text) => text.normalize("NFKC").toLowerCase();
const questions = [...document.querySelectorAll("article")].map((element) => ({
  element,
  exam: element.dataset.exam,
  is: element.dataset.is.split(" "),
  tags: JSON.parse(element.dataset.tags),
}));

function filter() {
  const chosen = Object.fromEntries(new FormData(form));
  const text = plain(chosen.search.trim());
  let count = 0;
  for (const question of questions) {
    if (text) question.text ??= plain([...question.element.querySelectorAll("h3, dd")].map((part) => part.textContent).join("\n"));
    const shown =
      question.is.includes(chosen.show) &&
      (!chosen.exam || question.exam === chosen.exam) &&
      (!chosen.tag || question.tags.includes(chosen.tag)) &&
      (!text || question.text.includes(text));
    question.element.hidden = !shown;
    count += shown;
  }
  form.querySelector("output").value = `${count} of ${questions.length} questions`;
}

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (!link) return;
  if (link.dataset.show) {
    form.reset(); // to all, from which the link chooses
    for (const [name, value] of Object.entries(link.dataset)) form.elements[name].value = value;
    filter();
  } else if (document.getElementById(link.hash.slice(1))?.hidden) {
    form.reset();
    filter();
  }
});
