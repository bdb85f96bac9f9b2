import { getJson } from '/page/api.js';
import { BlockMap } from '/page/blocks.js';
import { Chat } from '/page/chat.js';
import { Demo } from '/page/demo.js';
import { Live } from '/page/live.js';
import * as settings from '/page/settings.js';

const byId = (id) => document.getElementById(id);

let model = '';
let modelTimer = 0;
const map = new BlockMap(byId('map'));
const live = new Live(settings.apiKey, map);

async function askForModel() {
  clearTimeout(modelTimer);
  try {
    model = (await getJson('/v1/models', settings.apiKey())).data[0].id;
    byId('model').textContent = model;
  } catch {
    modelTimer = setTimeout(askForModel, 4000);  // what is wrong is said beside the figures
  }
}

function show(view) {
  document.body.dataset.view = view;
  for (const name of ['chat', 'memory']) byId(`view-${name}`).setAttribute('aria-pressed', String(name === view));
  map.draw();
}

settings.setUp(() => {
  askForModel();
  live.poll();
});
new Chat(() => model);
new Demo(byId('demo'), () => model, settings.apiKey, (text) => {
  byId('demo-problem').textContent = text;
  byId('demo-problem').hidden = !text;
});
for (const name of ['chat', 'memory']) byId(`view-${name}`).addEventListener('click', () => show(name));
askForModel();
live.poll();
if (!matchMedia('(pointer: coarse)').matches) byId('prompt').focus();  // a phone would raise its keyboard
