// Draws the figures of the page, in its colours: light, dark, and light again on paper.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)");
const PAPER_WIDTH = 675; // CSS pixels between the margins of A4
const INK = {
  light: { text: "#1b1f27", ground: "#ffffff", grid: "#e3e6eb", line: "#9aa1ac" },
  dark: { text: "#e6e9ef", ground: "#14171d", grid: "#2b313c", line: "#6b7482" },
};
const CONFIG = {
  responsive: true,
  displaylogo: false,
  displayModeBar: touch.matches ? false : "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // and none that sends the figure to a cloud
};

function inColours(figure, isDark) {
  const text = JSON.stringify(figure);
  return JSON.parse(isDark ? text.replaceAll("#0072b2", "#3d9be0") : text); // the blue is too deep for the dark
}

function dress(layout, isDark, onPaper) {
  const ink = INK[isDark ? "dark" : "light"];
  const base = layout.template.layout;
  base.font.color = ink.text;
  base.paper_bgcolor = base.plot_bgcolor = ink.ground;
  for (const axis of [base.xaxis, base.yaxis]) {
    axis.gridcolor = ink.grid;
    axis.linecolor = ink.line;
  }
  if (touch.matches) layout.dragmode = false; // a finger scrolls the page
  if (onPaper) {
    layout.width = PAPER_WIDTH;
    layout.height *= 0.85; // two to a page
  }
}

function draw(onPaper) {
  const isDark = dark.matches && !onPaper;
  for (const [name, figure] of Object.entries(figures)) {
    const place = document.getElementById(`figure-${name}`);
    const { data, layout } = inColours(figure, isDark);
    dress(layout, isDark, onPaper);
    place.style.height = `${layout.height}px`;
    Plotly.react(place, data, layout, CONFIG);
  }
}

draw(false);
dark.addEventListener("change", () => draw(false));
addEventListener("beforeprint", () => draw(true));
addEventListener("afterprint", () => draw(false));
