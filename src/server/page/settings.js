// Sampling settings and the key. Settings outlive the tab, the key does not.

const byId = (id) => document.getElementById(id);

const DEFAULTS = { system: '', temperature: 0.7, top_p: 0.95, max_tokens: 256, seed: '', kv_fusion: true };
const STORE = 'jointkv-settings';

function read() {
  return {
    system: byId('system').value,
    temperature: byId('temperature').valueAsNumber,
    top_p: byId('top_p').valueAsNumber,
    max_tokens: byId('max_tokens').valueAsNumber,
    seed: byId('seed').value,
    kv_fusion: byId('kv_fusion').checked,
  };
}

function summarise() {
  const { temperature, max_tokens, kv_fusion, system, seed } = read();
  const parts = [`temperature ${temperature}`, `${max_tokens} tokens`, `fusion ${kv_fusion ? 'on' : 'off'}`];
  if (seed) parts.push(`seed ${seed}`);
  if (system.trim()) parts.push('system prompt');
  byId('settings-summary').textContent = parts.join(' · ');
}

export function setUp(onKey) {
  let saved = {};
  try {
    saved = JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    // Storage is off or holds something else: the defaults do.
  }
  for (const [name, standard] of Object.entries(DEFAULTS)) {
    const value = typeof saved[name] === typeof standard ? saved[name] : standard;
    if (name === 'kv_fusion') byId(name).checked = value;
    else byId(name).value = value;
  }
  try {
    byId('api_key').value = sessionStorage.getItem(STORE) ?? '';
  } catch {
    // As above.
  }
  byId('settings').addEventListener('input', () => {
    summarise();
    try {
      localStorage.setItem(STORE, JSON.stringify(read()));
      sessionStorage.setItem(STORE, byId('api_key').value);
    } catch {
      // They hold for this page, then.
    }
  });
  byId('api_key').addEventListener('change', onKey);
  summarise();
}

export const apiKey = () => byId('api_key').value.trim();

// Opens the settings at the first field that the browser finds wrong.
export function check() {
  const wrong = byId('settings').querySelector(':invalid');
  if (!wrong) return true;
  byId('settings').open = true;
  wrong.reportValidity();
  return false;
}

export function askForKey() {
  byId('settings').open = true;
  byId('api_key').focus();
}

export const systemPrompt = () => byId('system').value.trim();

// What a request takes of them; an empty field leaves the choice to the server.
export function sampling() {
  const settings = read();
  const request = { kv_fusion: settings.kv_fusion ? 'on' : 'off' };
  for (const name of ['temperature', 'top_p', 'max_tokens']) {
    if (Number.isFinite(settings[name])) request[name] = settings[name];
  }
  if (settings.seed !== '') request.seed = Number(settings.seed);
  return request;
}
