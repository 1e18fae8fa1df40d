for (const head of document.querySelectorAll("table.sortable th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], place = head.cellIndex;
  const sign = head.dataset.sign = -(head.dataset.sign || 1);
  const value = row => { const text = row.cells[place].textContent, n = parseFloat(text); return isNaN(n) ? text : n; };
  [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    return sign * (typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? 1 : -1);
  }).forEach(row => body.append(row));
};
for (const figure of document.querySelectorAll("figure.image")) figure.onclick = () => {
  figure.classList.toggle("large");
  figure.scrollIntoView({block: "nearest"});
};
