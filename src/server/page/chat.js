// The conversation: one answer at a time, streamed. Text of the model only ever becomes text nodes.

import { ApiError, explain, streamChat } from '/page/api.js';
import * as settings from '/page/settings.js';

const byId = (id) => document.getElementById(id);

function element(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

export class Chat {
  constructor(model) {
    this.model = model;  // () => name
    this.messages = [];
    this.abort = null;
    byId('form').addEventListener('submit', (event) => {
      event.preventDefault();
      this.send(byId('prompt').value);
    });
    byId('prompt').addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send(byId('prompt').value);
    });
    byId('prompt').addEventListener('input', () => this.fit());
    byId('stop').addEventListener('click', () => this.abort?.abort());
    byId('clear').addEventListener('click', () => this.clear());
    document.addEventListener('keydown', (event) => {
      // Not where it ends a composition, was handled, or is meant for a field of the settings.
      if (event.key !== 'Escape' || event.isComposing || event.defaultPrevented) return;
      if (!document.activeElement?.closest('#settings')) this.abort?.abort();
    });
    for (const button of document.querySelectorAll('.suggestion')) {
      button.addEventListener('click', () => this.send(button.textContent));
    }
  }

  fit() {
    const prompt = byId('prompt');
    prompt.style.height = 'auto';
    prompt.style.height = `${prompt.scrollHeight + 2}px`;
  }

  clear() {
    this.abort?.abort();
    this.messages = [];
    byId('log').replaceChildren(byId('welcome'));
    byId('welcome').hidden = false;
    byId('prompt').focus();
  }

  // Follows the text while the reader is at its end.
  append(node) {
    const log = byId('log');
    log.append(node);
    log.scrollTop = log.scrollHeight;
  }

  addMessage(role, text) {
    const message = element('article', `message ${role}`);
    message.append(element('div', 'who', role === 'user' ? 'You' : 'Model'), element('div', 'text', text));
    this.append(message);
    return message;
  }

  async send(text) {
    text = text.trim();
    if (!text || this.abort || !settings.check()) return;
    byId('welcome').hidden = true;
    byId('prompt').value = '';
    this.fit();
    this.messages.push({ role: 'user', content: text });
    this.addMessage('user', text);
    await this.answer();
  }

  async answer() {
    const abort = new AbortController();
    this.abort = abort;
    this.showBusy(true);
    const message = this.addMessage('assistant', '');
    message.setAttribute('aria-busy', 'true');
    const out = message.querySelector('.text');
    const times = { start: performance.now(), first: 0 };
    let text = '';
    let note = '';
    try {
      const system = settings.systemPrompt();
      const messages = system ? [{ role: 'system', content: system }, ...this.messages] : this.messages;
      const request = { model: this.model(), messages, ...settings.sampling() };
      const result = await streamChat(request, settings.apiKey(), abort.signal, (piece) => {
        times.first ||= performance.now();
        text += piece;
        this.grow(out, piece);
      }, (piece) => {
        times.first ||= performance.now();
        this.think(message, out, piece);
      });
      note = this.facts(result, times);
    } catch (error) {
      if (abort.signal.aborted) note = 'Stopped.';
      else this.complain(error, text === '');
      if (text === '' && !message.querySelector('.thoughts')) message.remove();
    }
    message.removeAttribute('aria-busy');
    if (note && message.isConnected) message.append(element('div', 'facts', note));
    if (text && message.isConnected) this.messages.push({ role: 'assistant', content: text });
    this.abort = null;
    this.showBusy(false);
  }

  // What a model thinks stands before its answer, folded.
  think(message, out, piece) {
    let thoughts = message.querySelector('.thoughts');
    if (!thoughts) {
      thoughts = element('details', 'thoughts');
      thoughts.append(element('summary', '', 'Thoughts'), element('div', ''));
      message.insertBefore(thoughts, out);
    }
    this.grow(thoughts.lastChild, piece);
  }

  grow(out, piece) {
    const log = byId('log');
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    out.append(document.createTextNode(piece));
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  facts({ usage, finish }, times) {
    const parts = [];
    const tokens = usage?.completion_tokens;
    if (tokens) {
      parts.push(`${tokens} tokens`);
      const seconds = (performance.now() - times.first) / 1000;
      if (tokens > 1 && times.first && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tok/s`);
    }
    if (times.first) parts.push(`first after ${((times.first - times.start) / 1000).toFixed(2)} s`);
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (usage?.prompt_tokens) parts.push(`prompt of ${usage.prompt_tokens}${cached ? `, ${cached} from the cache` : ''}`);
    if (finish === 'length') parts.push('cut at the limit of tokens');
    return parts.join(' · ');
  }

  complain(error, canRetry) {
    const notice = element('p', 'notice', explain(error));
    notice.setAttribute('role', 'alert');
    if (canRetry) {
      const retry = element('button', '', 'Try again');
      retry.type = 'button';
      retry.addEventListener('click', () => {
        if (this.abort) return;
        notice.remove();
        this.answer();
      });
      notice.append(retry);
    }
    this.append(notice);
    if (error instanceof ApiError && error.status === 401) settings.askForKey();
  }

  showBusy(busy) {
    const focused = document.activeElement;
    byId('send').hidden = busy;
    byId('stop').hidden = !busy;
    if (focused === byId('send') || focused === byId('stop')) byId(busy ? 'stop' : 'prompt').focus();
  }
}
