// The demo load: four questions at once about the same notes, each with the notes in another order. It ends by itself.

import { ApiError, explain, streamChat } from '/page/api.js';

const REQUESTS = 4;
const MAX_TOKENS = 160;

const NOTES = [
  'The harbour was dredged in the spring so that the new ferry could moor at the old stone quay. Two barges carried the mud out past the lighthouse and let it sink where the water is forty metres deep. Fishermen feared for their grounds, but the catch of the summer was as large as that of the year before.',
  'The lighthouse keeper writes down the wind, the visibility and every ship that passes. His books go back a hundred and twelve years without a gap. A clerk of the weather office has begun to copy them, page by page, because they show how the winters have changed along this coast.',
  'On market days the square smells of smoked eel, onions and fresh bread. The stalls stand in the same order as they did when the baker was a child: cheese by the well, pottery under the limes, flowers along the wall of the church. Whoever wants a place must wait until somebody gives one up.',
  'The railway came late to the town and left early. For sixty years a small green train ran to the city twice a day. When the bridge was found to be unsafe the line was closed, and the station became a workshop where boats are built of oak and larch by three brothers and their apprentices.',
  'The school has ninety pupils and a garden in which they grow beans, potatoes and pears. Each class keeps a diary of rain and sun. In autumn the pears are pressed, and the juice is sold at the market to pay for the excursion to the islands, which the oldest pupils make in an open boat.',
  'The ferry takes forty minutes to the nearest island and runs three times a day, more often in August. It carries post, milk and medicine as well as people. In heavy weather it waits behind the breakwater; then the islanders light a lamp on the pier to say that they have all they need.',
  'A museum in the old customs house shows what the sea gave back: anchors, clay pipes, a ship\u2019s bell without a name, and a chest of tea that was still dry inside when it was opened. Visitors may ring the bell once. The keeper of the museum says that no two people ring it alike.',
  'In winter the town is quiet. The boats lie upside down on the beach, the caf\u00e9 opens only in the afternoon, and the choir practises in the church on Thursdays. The programme is always a secret until the first Sunday of spring, when the doors stand open and everybody who can walk comes to hear it.',
];
const QUESTIONS = [
  'What did the lighthouse keeper write down, and why is it copied now?',
  'How does the ferry serve the islands?',
  'What became of the railway station?',
  'What can a visitor do in the museum?',
];

// Another order for each request, the same on every run.
function shuffled(seed) {
  const notes = [...NOTES];
  for (let i = notes.length - 1; i > 0; --i) {
    seed = (seed * 1103515245 + 12345) % 2147483648;
    const j = seed % (i + 1);
    [notes[i], notes[j]] = [notes[j], notes[i]];
  }
  return notes;
}

export class Demo {
  constructor(button, model, key, onProblem) {
    this.abort = null;
    button.addEventListener('click', async () => {
      if (this.abort) {
        this.abort.abort();
        return;
      }
      this.abort = new AbortController();
      button.textContent = 'Stop the demo load';
      onProblem('');
      const runs = QUESTIONS.slice(0, REQUESTS).map((question, i) => this.run(question, i, model(), key()));
      for (const { reason } of (await Promise.allSettled(runs)).filter(({ status }) => status === 'rejected')) {
        if (this.abort.signal.aborted) break;
        onProblem(reason instanceof ApiError || reason instanceof TypeError ? explain(reason) : String(reason));
      }
      this.abort = null;
      button.textContent = 'Run a demo load';
    });
  }

  run(question, i, model, key) {
    const content = `Read these notes about a town by the sea.\n\n${shuffled(i + 1).join('\n\n')}\n\n${question}`;
    const request = { model, messages: [{ role: 'user', content }], max_tokens: MAX_TOKENS, min_tokens: MAX_TOKENS, temperature: 0.7, seed: i };
    return streamChat(request, key, this.abort.signal, () => {});
  }
}
