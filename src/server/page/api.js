// Talks to the server: JSON with GET, chat answers as server-sent events.

export class ApiError extends Error {
  constructor(status, message, retryAfterS) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function errorOf(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim() + '.';
  try {
    const body = await response.json();
    if (typeof body.error?.message === 'string') message = body.error.message;
  } catch {
    // Not JSON: the status says it.
  }
  const retry = Number(response.headers.get('Retry-After'));
  return new ApiError(response.status, message, retry > 0 ? retry : undefined);
}

export async function getJson(path, key, timeoutMs = 8000) {
  const response = await fetch(path, { headers: headers(key), signal: AbortSignal.timeout(timeoutMs), cache: 'no-store' });
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

// The data of each event of a stream, in order.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = '';
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    pending += value;
    const lines = pending.split('\n');
    pending = lines.pop();
    for (const raw of lines) {
      const line = raw.endsWith('\r') ? raw.slice(0, -1) : raw;
      if (line.startsWith('data:')) {
        data.push(line.slice(line[5] === ' ' ? 6 : 5));
      } else if (line === '' && data.length > 0) {
        yield data.join('\n');
        data = [];
      }
    }
  }
}

// Streams one chat answer: onText for each piece. Returns {finish, usage}; throws ApiError, TypeError (no connection), or
// AbortError.
export async function streamChat(request, key, signal, onText, onThought) {
  const response = await fetch('/v1/chat/completions', {
    method: 'POST',
    headers: { ...headers(key), 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  const result = { finish: null, usage: null };
  for await (const data of events(response.body)) {
    if (data === '[DONE]') return result;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(0, String(chunk.error.message ?? chunk.error));
    if (chunk.usage) result.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (choice?.delta?.reasoning_content) onThought(choice.delta.reasoning_content);
    if (choice?.delta?.content) onText(choice.delta.content);
    if (choice?.finish_reason) result.finish = choice.finish_reason;
  }
  throw new TypeError('The connection ended before the answer did.');
}

// What to tell a person.
export function explain(error) {
  if (error instanceof ApiError) {
    if (error.status === 401) return 'The server asks for an API key. Enter one under Settings.';
    if (error.status === 403) return `This key may not do that. ${error.message}`;
    if (error.retryAfterS) return `${error.message} Try again in ${error.retryAfterS} s.`;
    return error.message;
  }
  if (error.name === 'TimeoutError') return 'The server takes too long to answer.';
  if (error instanceof SyntaxError) return 'The server sent something that is not an answer.';
  return error.message.startsWith('The connection') ? error.message : 'The server cannot be reached.';
}
