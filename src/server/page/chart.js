// A small line chart of the last two minutes, as SVG.

const SVG = 'http://www.w3.org/2000/svg';
const SECONDS = 120;
const WIDTH = 300;
const HEIGHT = 88;
const LEFT = 0;
const BOTTOM = 4;
const TOP = 14;

function svg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// The least of 1, 2, 5 and their tens, times a power of `base`, that is not below.
function roundUp(value, base) {
  const unit = base ** Math.max(0, Math.floor(Math.log(value) / Math.log(base)));
  const power = 10 ** Math.floor(Math.log10(value / unit)) * unit;
  return [1, 2, 5, 10].map((x) => x * power).find((x) => x >= value * 0.999);
}

export class Chart {
  // `format` names values of the axis, which starts at `floor`; its units are powers of `base`.
  constructor(root, format, floor, base) {
    this.root = root;
    this.format = format;
    this.floor = floor;
    this.base = base;
    this.points = [];
    this.draw();
  }

  describe(text) {
    this.root.setAttribute('aria-label', text);
  }

  // Values by class name; null: none at that time.
  add(time, values) {
    if (this.points.length > 0 && time < this.points.at(-1).time) this.points = [];  // the server has started anew
    this.points.push({ time, values });
    while (this.points[0].time < time - SECONDS) this.points.shift();
    this.draw();
  }

  draw() {
    const width = this.root.clientWidth || WIDTH;
    this.root.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`);
    const numbers = this.points.flatMap(({ values }) => Object.values(values)).filter((value) => value !== null);
    // Values below the usual floor have it lowered to a tenth below them.
    const floor = Math.min(this.floor, Math.floor(10 * Math.min(...numbers, this.floor)) / 10);
    const span = roundUp(Math.max(...numbers, this.floor + 0.001) - floor, this.base);
    const end = this.points.at(-1)?.time ?? 0;
    const x = (time) => LEFT + (width - LEFT) * (1 - (end - time) / SECONDS);
    const y = (value) => HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - floor) / span;
    const nodes = [0, 1].map((share) => {
      const at = y(floor + share * span);
      return svg('line', { class: 'grid', x1: LEFT, x2: width, y1: at, y2: at });
    });
    if (Math.max(...numbers) > floor) {
      const label = svg('text', { x: LEFT, y: TOP - 4 });
      label.textContent = this.format(floor + span);
      nodes.push(label);
    }
    for (const name of Object.keys(this.points[0]?.values ?? {})) nodes.push(...this.lines(name, x, y));
    this.root.replaceChildren(...nodes);
  }

  // One line for each run of points that have a value.
  lines(name, x, y) {
    const runs = [[]];
    for (const { time, values } of this.points) {
      if (values[name] === null) runs.push([]);
      else runs.at(-1).push([x(time), y(values[name])]);
    }
    const nodes = [];
    for (const run of runs.filter((points) => points.length > 0)) {
      if (run.length === 1) run.unshift([Math.max(LEFT, run[0][0] - 1), run[0][1]]);
      const path = run.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(' ');
      if (name === 'physical-line') {
        const base = y(this.floor);
        nodes.push(svg('polygon', { class: 'physical-area', points: `${run[0][0]},${base} ${path} ${run.at(-1)[0]},${base}` }));
      }
      nodes.push(svg('polyline', { class: `line ${name}`, points: path }));
    }
    return nodes;
  }
}
