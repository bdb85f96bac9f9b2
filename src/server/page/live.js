// The figures: asks the server about once a second while the page is seen, and draws what came of it.

import { ApiError, explain, getJson } from '/page/api.js';
import { Chart } from '/page/chart.js';

const byId = (id) => document.getElementById(id);
const EVERY_MS = 1000;
const EVERY_MS_LOST = 4000;

function bytes(n) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) {
    n /= 1024;
    ++i;
  }
  return [i === 0 || n >= 100 ? n.toFixed(0) : n.toFixed(1), units[i]];
}

const factor = (x) => (x >= 100 ? x.toFixed(0) : x.toFixed(2));

export class Live {
  constructor(key, map) {
    this.key = key;  // () => API key
    this.map = map;
    this.before = null;
    this.timer = 0;
    this.compression = new Chart(byId('chart-compression'), (y) => `${y.toFixed(1)}×`, 1, 10);
    this.memory = new Chart(byId('chart-memory'), (y) => bytes(y).join(' '), 0, 1024);
    document.addEventListener('visibilitychange', () => this.poll());
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.map.draw());
    addEventListener('resize', () => this.map.draw());
  }

  async poll() {
    clearTimeout(this.timer);
    if (document.hidden || this.busy) return;
    this.busy = true;
    let again = EVERY_MS;
    try {
      const key = this.key();
      // A tenant's key may see its own blocks where it may not see the figures, which are everybody's.
      const [status, blocks] =
        await Promise.allSettled([getJson('/jointkv/status', key), getJson('/jointkv/blocks', key)]);
      if (blocks.status === 'rejected') throw blocks.reason;
      this.map.update(blocks.value);
      if (status.status === 'rejected') throw status.reason;
      this.show(status.value);
      this.problem('', 'ready', 'Ready');
    } catch (error) {
      again = error.status === 403 ? EVERY_MS : EVERY_MS_LOST;
      this.fail(error);
    }
    this.busy = false;
    this.timer = setTimeout(() => this.poll(), again);
  }

  fail(error) {
    this.before = null;
    if (!(error instanceof ApiError)) return this.problem(explain(error), 'lost', 'No connection');
    if (error.status === 403) return this.problem('These figures are for keys of administrators.', 'ready', 'Ready');
    if (error.status === 503) return this.problem('', 'waiting', 'Not ready');
    if (error.status === 401) return this.problem('These figures need an API key. Enter one under Settings.', 'waiting', 'Key needed');
    return this.problem(explain(error), 'waiting', 'No figures');
  }

  problem(text, state, word) {
    const connection = byId('connection');
    if (connection.textContent !== word) connection.textContent = word;
    connection.dataset.state = state;
    const notice = byId('live-problem');
    if (notice.textContent !== text) notice.textContent = text;
    notice.hidden = !text;
  }

  show(status) {
    const { kv, compression } = status;
    const put = (id, text) => { byId(id).textContent = text; };
    if (this.before && status.time_s > this.before.time_s) {
      const rate = (status.output_tokens - this.before.output_tokens) / (status.time_s - this.before.time_s);
      put('rate', rate >= 100 || rate === 0 ? rate.toFixed(0) : rate.toFixed(1));
    }
    put('running', status.running);
    put('running-of', `of ${status.max_running}`);
    put('waiting', status.waiting);
    for (const name of ['logical', 'physical']) {
      const [number, unit] = bytes(kv[`${name}_bytes`]);
      put(name, number);
      put(`${name}-unit`, unit);
    }
    const runs = kv.logical_bytes > 0;
    put('compression', runs ? factor(compression.total) : '–');
    put('compression-unit', runs ? '×' : '');
    put('factors', this.factorsOf(status, runs));
    if (!this.before || status.time_s > this.before.time_s) this.plot(status, runs);
    this.before = status;
  }

  factorsOf({ kv, compression, fusion }, runs) {
    if (runs) {
      return `exact sharing ${factor(compression.exact_sharing)} × fusion ${factor(compression.fusion)}` +
        ` × codec ${factor(compression.codec)}`;
    }
    const cached = `${bytes(kv.cached_bytes).join(' ')} kept for known prefixes, of ${bytes(kv.capacity_bytes).join(' ')}`;
    return fusion.policy === 'off' ? `${cached}; fusion is off` : cached;
  }

  plot({ time_s, kv, compression }, runs) {
    this.compression.add(time_s, { 'compression-line': runs ? compression.total : null });
    this.memory.add(time_s, { 'logical-line': kv.logical_bytes, 'physical-line': kv.physical_bytes });
    const last = byId('compression').textContent;
    this.compression.describe(runs ? `Compression over the last two minutes; now ${last} times.` : 'Compression; nothing runs.');
    this.memory.describe(`KV memory over the last two minutes; now ${bytes(kv.logical_bytes).join(' ')} logical, ` +
      `${bytes(kv.physical_bytes).join(' ')} physical.`);
  }
}
