// The block map: a grid for each running request. Rows are layers, K above V in each; columns are blocks.

const byId = (id) => document.getElementById(id);
const ENDED_FOR_MS = 20000;  // a request stays on view, faded, for so long
const ENDED_MAX = 4;
const STATES = { o: 'private', p: 'shared prefix', f: 'fused', '-': 'left the window' };
const COLOURS = { o: '--own', p: '--prefix', f: '--fused', '-': '--gone' };

function readersOf(digit) {
  return digit === 'z' ? '35 or more' : String(parseInt(digit, 36));
}

// One request's picture. The arrow keys and the pointer move over its cells.
class Picture {
  constructor(name) {
    this.name = name;
    this.cursor = null;
    this.section = document.createElement('section');
    this.section.className = 'request';
    const title = document.createElement('h3');
    this.title = document.createTextNode('');
    this.facts = document.createElement('span');
    title.append(this.title, this.facts);
    this.canvas = document.createElement('canvas');
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute('role', 'img');
    this.canvas.addEventListener('pointermove', (event) => this.point(event));
    this.canvas.addEventListener('pointerdown', (event) => this.point(event));
    // A finger that is lifted leaves what it pointed at, and so does a mouse what the keyboard did.
    this.canvas.addEventListener('pointerleave', ({ pointerType }) => {
      if (pointerType !== 'touch' && document.activeElement !== this.canvas) this.leave();
    });
    this.canvas.addEventListener('focus', () => {
      if (!this.cursor) this.moveTo(0, 0);
    });
    this.canvas.addEventListener('blur', () => this.leave());
    this.canvas.addEventListener('keydown', (event) => this.step(event));
    this.section.append(title, this.canvas);
  }

  update(request) {
    this.request = request;
    this.seen = performance.now();
    this.ended = false;
    this.section.classList.remove('ended');
    const count = { o: 0, p: 0, f: 0, '-': 0 };
    for (const row of request.rows) {
      for (const state of row.k + row.v) ++count[state];
    }
    const held = count.o + count.p + count.f || 1;
    const share = (state) => `${Math.round(100 * count[state] / held)} %`;
    this.title.data = this.name;
    this.facts.textContent = `${request.phase} · ${request.tokens} tokens · ${request.blocks} blocks` +
      ` · ${share('f')} fused, ${share('p')} shared` + (request.kv_fusion ? '' : ' · exact');
    this.canvas.setAttribute('aria-label', `${this.name}: ${this.facts.textContent}. Arrow keys move over the blocks.`);
    if (this.cursor) this.moveTo(this.cursor.row, this.cursor.column);
    else this.draw();
  }

  end() {
    this.ended = true;
    this.section.classList.add('ended');
    this.facts.textContent = this.facts.textContent.replace(/^(decode|prefill)/, 'ended');
  }

  draw() {
    if (!this.request) return;
    const { rows, starts } = this.request;
    const room = this.section.clientWidth - 26;
    if (room <= 0 || starts.length === 0) return;
    const layerHeight = rows.length > 40 ? 4 : rows.length > 20 ? 6 : 8;
    const width = Math.max(2, Math.min(18, Math.floor(room / starts.length)));
    const scale = devicePixelRatio || 1;
    this.cell = { width, height: layerHeight };
    const cssWidth = width * starts.length;
    const cssHeight = layerHeight * rows.length;
    this.canvas.width = Math.round(cssWidth * scale);
    this.canvas.height = Math.round(cssHeight * scale);
    this.canvas.style.width = `${cssWidth}px`;
    this.canvas.style.height = `${cssHeight}px`;
    const pen = this.canvas.getContext('2d');
    pen.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    const colour = Object.fromEntries(Object.entries(COLOURS).map(([state, name]) => [state, style.getPropertyValue(name)]));
    const gap = width > 4 ? 1 : 0.5;
    rows.forEach((row, r) => {
      [row.k, row.v].forEach((states, half) => {
        const y = r * layerHeight + half * layerHeight / 2;
        const h = layerHeight / 2 - (half === 1 ? gap : 0);
        // A run of one state is one rectangle, cut by the gaps below.
        for (let c = 0; c < states.length; ++c) {
          pen.fillStyle = colour[states[c]];
          pen.fillRect(c * width, y, width - gap, h);
        }
      });
    });
    if (this.cursor) {
      pen.strokeStyle = style.getPropertyValue('--text');
      pen.lineWidth = 1.5;
      pen.strokeRect(this.cursor.column * width - 0.75, this.cursor.row * layerHeight - 0.75, width + 0.5, layerHeight + 0.5);
    }
  }

  point(event) {
    if (!this.cell) return;
    const box = this.canvas.getBoundingClientRect();
    const shrink = box.width / (this.cell.width * this.request.starts.length) || 1;
    this.moveTo(Math.floor((event.clientY - box.top) / this.cell.height),
                Math.floor((event.clientX - box.left) / (this.cell.width * shrink)));
  }

  step(event) {
    const { row, column } = this.cursor ?? { row: 0, column: 0 };
    const to = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1], Home: [row, 0], End: [row, Infinity],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.moveTo(...to);
  }

  moveTo(row, column) {
    if (!this.request) return;
    const { rows, starts } = this.request;
    row = Math.max(0, Math.min(rows.length - 1, row));
    column = Math.max(0, Math.min(starts.length - 1, column));
    this.cursor = { row, column };
    byId('readout').textContent = this.describe(row, column);
    this.draw();
  }

  leave() {
    this.cursor = null;
    byId('readout').textContent = '';
    this.draw();
  }

  describe(r, c) {
    const { rows, starts, sizes, block_stride } = this.request;
    const row = rows[r];
    const of = (kind) => {
      const state = row[kind][c];
      if (state === '-') return `${kind.toUpperCase()} ${STATES[state]}`;
      const readers = readersOf(row[`${kind}_readers`][c]);
      return `${kind.toUpperCase()} ${STATES[state]}, ${readers} ${readers === '1' ? 'reader' : 'readers'}`;
    };
    return `${this.name}, layer ${row.layer}, block ${c * block_stride}` +
      ` (tokens ${starts[c]} to ${starts[c] + sizes[c] - 1}): ${of('k')}; ${of('v')}`;
  }
}

export class BlockMap {
  constructor(root) {
    this.root = root;
    this.pictures = new Map();
    this.more = document.createElement('p');
    this.more.className = 'more';
  }

  draw() {
    for (const picture of this.pictures.values()) picture.draw();
  }

  update(map) {
    const present = new Set();
    const several = new Set(map.requests.filter(({ choice }) => choice > 0).map(({ id }) => id));
    for (const request of map.requests) {
      const id = `${request.id}/${request.choice}`;
      present.add(id);
      if (!this.pictures.has(id)) {
        const name = `Request ${request.id}` + (several.has(request.id) ? `, choice ${request.choice}` : '');
        const picture = new Picture(name);
        this.pictures.set(id, picture);
        this.root.prepend(picture.section);
      }
      this.pictures.get(id).update(request);
    }
    this.fade(present);
    byId('map-empty').hidden = this.pictures.size > 0;
    this.more.textContent = this.leftOut(map);
    if (this.more.textContent) this.root.append(this.more);
    else this.more.remove();
  }

  // What has ended stays for a while, the latest few.
  fade(present) {
    const ended = [...this.pictures].filter(([id]) => !present.has(id));
    for (const [, picture] of ended) if (!picture.ended) picture.end();
    const late = performance.now() - ENDED_FOR_MS;
    ended.forEach(([id, picture], i) => {
      if (picture.seen > late && i >= ended.length - ENDED_MAX) return;
      picture.section.remove();
      this.pictures.delete(id);
    });
  }

  leftOut(map) {
    const parts = [];
    if (map.running > map.requests.length) parts.push(`${map.running - map.requests.length} more sequences run.`);
    if (map.layer_stride > 1) parts.push(`Every ${map.layer_stride}th of ${map.layers} layers is shown.`);
    const stride = Math.max(1, ...map.requests.map(({ block_stride }) => block_stride));
    if (stride > 1) parts.push(`Long requests show every ${stride}th block.`);
    return parts.join(' ');
  }
}
