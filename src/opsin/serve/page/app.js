// The page of `opsin serve`: pictures → cards, attention, a map of embeddings. No framework, no build, no other host.
//
//   words      what the page says, in two languages
//   server     requests, in turn, with patience
//   pictures   a file → a card with a view for each model
//   attention  POST /explain → colours over the picture
//   map        /v1/embeddings → two axes
//   code       the same as curl and Python
//   ways in    drop, paste, choose, camera

const TOP_K = 5;
const AT_ONCE = 4; // requests
const TRIES = 5; // of a server that says "later"
const DRAWN_SIDE = 800; // pixels of an overlay, at most
const CROWD = 24; // pictures on a map, from which they are drawn smaller
// inferno, which is what `opsin explain` draws with
const RAMP = ['#280b53', '#65156e', '#9f2a63', '#d44842', '#f57d15', '#fac228', '#fcffa4'];

const byId = id => document.getElementById(id);

// ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────

export const WORDS = {
  en: {
    skip: 'Skip to the pictures', motto: 'What a model sees in a picture, and where it looks.', settings: 'Settings',
    dark: 'Dark', again: 'Try again', key: 'API key', use: 'Use it',
    keyNote: 'This server asks for a key. It is kept until this tab is closed, and sent to this server only.',
    add: 'Add pictures', invite: 'Drop pictures here, or paste one', choose: 'Choose pictures',
    camera: 'Use the camera', tools: 'Models', looks: 'What is shown of the attention', model: 'Model', compare: 'Compare with', nothing: 'nothing',
    attention: 'Show attention', clear: 'Remove all', pictures: 'Pictures', map: 'Alike to the model',
    mapNote: 'Pictures that lie close together have similar embeddings: their two main directions, by PCA.',
    code: 'The same from your code', copy: 'Copy', copied: 'Copied', snap: 'Take a picture', done: 'Done',
    remove: name => `Remove ${name}`, offline: 'The server does not answer. Is it still running?',
    status: status => `The server answered with status ${status}.`,
    later: (message, seconds) => `${message} Trying again in ${seconds} s.`, now: 'Try now',
    looking: 'Looking …', asking: 'Computing its attention …', noPreview: 'This browser cannot show it.',
    trip: (trip, server) => `${trip} round trip${server ? `, ${server} in the server` : ''}`,
    said: (name, label, percent) => `${name}: ${label}, ${percent}`,
    both: 'Both say ', bothEnd: '', differ: 'They differ: ', differMiddle: ' or ', only: 'only here',
    points: 'percentage points more or less than the first model', layer: 'Layer', head: 'Head', strength: 'Strength',
    of: (which, count) => `${which} of ${count}`, mean: count => (count > 1 ? `mean of ${count}` : 'the only one'),
    onlyMean: 'mean', cross: 'cross-attention', self: (which, count) => `self ${which} of ${count}`,
    less: 'Little', most: 'much attention',
    layerOf: model => `Layer of ${model}`, headOf: model => `Head of ${model}`, noAttention: 'has no attention to show',
    noLabels: 'This model gives embeddings and no labels: the map below is made of them.',
    waitingFor: 'appears with the first picture', alike: (name, cosine) => `most like ${name} (${cosine})`,
    snapshot: number => `camera-${number}.jpg`, pasted: (number, kind) => `pasted-${number}.${kind}`,
    noCamera: 'No camera: this browser has none, or gives it only to pages of https:// and localhost.',
    refusedCamera: 'The camera could not be used: ',
  },
  zh: {
    skip: '跳到图片', motto: '模型在图片里看到了什么，又在看哪里。', settings: '设置',
    dark: '深色', again: '重试', key: 'API 密钥', use: '使用',
    keyNote: '此服务器需要密钥。密钥仅保留到此标签页关闭为止，且只会发送给此服务器。',
    add: '添加图片', invite: '把图片拖到这里，或直接粘贴', choose: '选择图片',
    camera: '使用摄像头', tools: '模型', looks: '注意力显示设置', model: '模型', compare: '对比模型', nothing: '无',
    attention: '显示注意力', clear: '全部移除', pictures: '图片', map: '模型眼中的相似度',
    mapNote: '位置相近的图片，嵌入向量也相似：图中的两个方向是 PCA 的前两个主成分。',
    code: '用代码调用', copy: '复制', copied: '已复制', snap: '拍照', done: '完成',
    remove: name => `移除 ${name}`, offline: '服务器没有响应，它还在运行吗？',
    status: status => `服务器返回状态码 ${status}。`,
    later: (message, seconds) => `${message}（${seconds} 秒后重试）`, now: '立即重试',
    looking: '识别中……', asking: '正在计算注意力……', noPreview: '浏览器无法显示此图片。',
    trip: (trip, server) => `往返 ${trip}${server ? `，其中服务器 ${server}` : ''}`,
    said: (name, label, percent) => `${name}：${label}，${percent}`,
    both: '结果一致：', bothEnd: '', differ: '结果不同：', differMiddle: ' / ', only: '仅此模型',
    points: '与第一个模型相差的百分点', layer: '层', head: '头', strength: '不透明度',
    of: (which, count) => `${which} / ${count}`, mean: count => (count > 1 ? `${count} 个头的平均` : '只有一个头'),
    onlyMean: '各头的平均', cross: '交叉注意力', self: (which, count) => `自注意力 ${which} / ${count}`,
    less: '注意力低', most: '高',
    layerOf: model => `${model} 的层`, headOf: model => `${model} 的注意力头`, noAttention: '没有可显示的注意力',
    noLabels: '此模型只输出嵌入向量，不输出标签：下方的分布图由这些向量画出。',
    waitingFor: '添加图片后显示', alike: (name, cosine) => `最像 ${name}（${cosine}）`,
    snapshot: number => `拍摄-${number}.jpg`, pasted: (number, kind) => `粘贴-${number}.${kind}`,
    noCamera: '无法使用摄像头：此浏览器不支持，或只允许 https:// 与 localhost 的页面使用。',
    refusedCamera: '无法使用摄像头：',
  },
};

const kept = {
  // private windows may refuse storage
  get(store, name) { try { return window[store].getItem(name); } catch { return null; } },
  set(store, name, value) { try { window[store].setItem(name, value); } catch { /* kept for this page only */ } },
};

let lang = kept.get('localStorage', 'opsin-lang') ?? (navigator.language.startsWith('zh') ? 'zh' : 'en');

function t(name, ...values) {
  const words = (WORDS[lang] ?? WORDS.en)[name];
  return typeof words === 'function' ? words(...values) : words;
}

/** An element with properties, and children that are elements or text; never markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

const ICONS = {
  cross: 'M6 6 18 18M18 6 6 18',
  agree: 'M4.5 12.5 9.5 17.5 19.5 7',
  differ: 'M5 9.5H19M5 14.5H19M15.5 5 8.5 19',
};

function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  path.setAttribute('d', ICONS[name]);
  svg.append(path);
  return svg;
}

const percent = share => new Intl.NumberFormat(lang, {style: 'percent', minimumFractionDigits: 1, maximumFractionDigits: 1}).format(share);
const milliseconds = ms => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

/** "tailed frog, bell toad, …" → its first name and the others. */
function synonyms(label) {
  const [first, ...others] = label.split(/\s*[,，、;；]\s*/);
  return {first, others: others.join(', ')};
}

function say(text) {
  byId('said').append(make('p', {textContent: text}));
  while (byId('said').childElementCount > 8) byId('said').firstElementChild.remove();
}

// ── server ───────────────────────────────────────────────────────────────────────────────────────────────────────────

/** An answer other than 200, in the server's words; `seconds` where it says "later". */
class Refused extends Error {
  constructor(message, status, seconds = 0) {
    super(message);
    this.status = status;
    this.isLater = status === 429 || status === 503;
    this.seconds = Math.min(60, Math.max(1, seconds || 1));
  }
}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = kept.get('sessionStorage', 'opsin-key');
  if (key) headers.set('Authorization', `Bearer ${key}`);
  let answer;
  try {
    answer = await fetch(path, {...options, headers});
  } catch {
    throw new Refused(t('offline'), 0);
  }
  if (answer.ok) {
    const [, ms] = /\bdur=([\d.]+)/.exec(answer.headers.get('Server-Timing')) ?? [];
    return Object.assign(await answer.json(), {serverMs: Number(ms) || null});
  }
  let message = t('status', answer.status);
  try {
    const {error} = await answer.json();
    message = (typeof error === 'string' ? error : error.message) || message;
  } catch { /* a proxy's page */ }
  if (answer.status === 401) byId('key').hidden = false;
  throw new Refused(message, answer.status, Number(answer.headers.get('Retry-After')));
}

const turns = {waiting: [], running: 0};

/** Run a job when there is room; those of lower rank first. */
function inTurn(rank, job) {
  return new Promise((resolve, reject) => {
    turns.waiting.push({rank, job, resolve, reject});
    turns.waiting.sort((one, other) => one.rank - other.rank);
    nextTurn();
  });
}

function nextTurn() {
  while (turns.running < AT_ONCE && turns.waiting.length) {
    const {job, resolve, reject} = turns.waiting.shift();
    turns.running += 1;
    job().then(resolve, reject).finally(() => {
      turns.running -= 1;
      nextTurn();
    });
  }
}

/** As `inTurn`; a server that says "later" is asked again, after `wait(error)`. */
async function patiently(rank, job, wait) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await inTurn(rank, job);
    } catch (error) {
      if (!error.isLater || tries === TRIES) throw error;
      await wait(error);
    }
  }
}

const sleep = seconds => new Promise(resolve => setTimeout(resolve, seconds * 1e3));

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function query(path, values) {
  return `${path}?${new URLSearchParams(values).toString().replaceAll('%2F', '/')}`;
}

// ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────

let models = []; // what GET /v1/models lists
const looks = new Map(); // model → {layer, head}: what is shown of its attention
let strength = 0.75;

const chosen = () => [byId('model').value, byId('beside').value].filter(Boolean);
const isLooking = () => byId('attention').checked;
const hasAttention = name => models.find(model => model.id === name)?.attention !== false;

async function loadModels() {
  byId('problem').hidden = true;
  const complain = error => {
    byId('problem').firstElementChild.textContent = error.message;
    byId('problem').hidden = error.status === 401; // the form for the key says so
  };
  try {
    models = (await patiently(0, () => ask('v1/models'), async error => {
      complain(error);
      await sleep(error.seconds);
    })).data;
    byId('problem').hidden = true;
  } catch (error) {
    complain(error);
    return;
  }
  const [first] = chosen();
  byId('model').replaceChildren(...models.map(({id}) => make('option', {value: id, textContent: id})));
  if (models.some(({id}) => id === first)) byId('model').value = first;
  listOthers();
  showModels();
}

/** What the first model can be compared with. */
function listOthers() {
  const beside = byId('beside');
  const before = beside.value;
  const others = models.filter(({id}) => id !== byId('model').value);
  beside.replaceChildren(
    make('option', {value: '', textContent: t('nothing')}),
    ...others.map(({id}) => make('option', {value: id, textContent: id})),
  );
  beside.value = others.some(({id}) => id === before) ? before : '';
  beside.closest('label').hidden = models.length < 2;
}

/** After another choice of models. */
function showModels() {
  document.body.classList.toggle('is-comparing', chosen().length > 1);
  const none = chosen().length > 0 && !chosen().some(hasAttention);
  byId('attention').disabled = none;
  if (none) byId('attention').checked = false;
  for (const picture of pictures) layOut(picture);
  showLooks();
  showMap();
  showCode();
}

// ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** What was dropped: {file, name, url, image, size, card, views, answers, maps, embeddings}; the last three by model. */
const pictures = [];

function add(files, name = file => file.name) {
  const added = files.map(file => {
    const picture = {
      file, name: name(file), url: URL.createObjectURL(file), image: new Image(), size: null, isGone: false,
      views: [], answers: new Map(), maps: new Map(), embeddings: new Map(),
    };
    picture.image.src = picture.url;
    picture.ready = picture.image.decode().then(
      () => { picture.size ??= [picture.image.naturalWidth, picture.image.naturalHeight]; },
      () => { picture.image = null; },
    );
    picture.card = make('article', {className: 'card', tabIndex: -1});
    byId('pictures').append(picture.card);
    pictures.push(picture);
    return picture;
  });
  if (!added.length) return;
  showCount();
  for (const picture of added) picture.ready.then(() => picture.isGone || layOut(picture));
  if (pictures.length > added.length) added[0].card.scrollIntoView({behavior: 'smooth', block: 'nearest'});
}

function remove(picture) {
  const place = pictures.indexOf(picture);
  pictures.splice(place, 1);
  picture.isGone = true;
  picture.card.remove();
  URL.revokeObjectURL(picture.url);
  showCount();
  showMap();
  (pictures[Math.min(place, pictures.length - 1)]?.card ?? byId('choose')).focus();
}

function showCount() {
  document.body.classList.toggle('has-pictures', pictures.length > 0);
  byId('clear').hidden = pictures.length < 2;
}

/** Fill a card: a view for each model that is chosen. */
function layOut(picture) {
  const {card, name} = picture;
  const close = make('button', {type: 'button', className: 'quiet icon', ariaLabel: t('remove', name)}, icon('cross'));
  close.addEventListener('click', () => remove(picture));
  const title = make('h3', {title: name}, name);
  if (picture.size) title.append(make('small', {textContent: picture.size.join(' × ')}));
  picture.views = chosen().map(model => makeView(picture, model));
  picture.verdict = make('p', {className: 'verdict', hidden: true});
  card.replaceChildren(
    make('header', {}, title, close),
    picture.verdict,
    make('div', {className: 'views'}, ...picture.views.map(view => view.element)),
  );
  for (const view of picture.views) {
    classify(view);
    look(view);
  }
}

function makeView(picture, model) {
  const stage = make('div', {className: 'stage'});
  const canvas = make('canvas', {hidden: true, ariaHidden: 'true'});
  if (picture.image) {
    const [width, height] = picture.size;
    const ratio = width / height;
    const stageRatio = clamp(ratio, 1, 2);
    const frame = make('div', {className: 'frame'}, make('img', {src: picture.url, alt: picture.name}), canvas);
    frame.style.width = `${100 * Math.min(1, ratio / stageRatio)}%`;
    frame.style.aspectRatio = ratio;
    stage.style.aspectRatio = stageRatio;
    stage.append(frame);
  } else {
    stage.append(make('p', {className: 'gone', textContent: t('noPreview')}));
  }
  const title = chosen().length > 1 ? make('h4', {textContent: model}) : null;
  const answer = make('div', {className: 'body'});
  const looking = make('p', {className: 'facts', hidden: true});
  const element = make('section', {className: 'view', ariaLabel: model}, stage,
    make('div', {className: 'answer'}, title, answer, looking));
  return {picture, model, element, canvas, answer, looking};
}

const isShown = view => !view.picture.isGone && view.picture.views.includes(view);

/** Labels of a view: those known already, or the server's. */
async function classify(view) {
  const {picture, model} = view;
  const key = `${lang} ${model}`;
  if (models.find(({id}) => id === model)?.classes === 0) {
    view.answer.replaceChildren(make('p', {className: 'wait', textContent: t('noLabels')}));
    placeOnMap(picture);
    return;
  }
  if (!picture.answers.has(key)) {
    view.answer.replaceChildren(make('p', {className: 'wait is-busy', textContent: t('looking')}));
    try {
      const answer = await patiently(1, () => (isShown(view) ? timed(picture, model) : Promise.resolve(null)),
        error => waitIn(view.answer, error));
      if (answer === null) return;
      picture.answers.set(key, answer);
      say(t('said', picture.name, synonyms(answer.topk[0].label).first, percent(answer.topk[0].score)));
    } catch (error) {
      if (!isShown(view)) return;
      const again = make('button', {type: 'button', textContent: t('again')});
      again.addEventListener('click', () => classify(view));
      const worth = error.status === 0 || error.status >= 429 || error.status === 401;
      view.answer.replaceChildren(make('p', {className: 'problem', textContent: error.message}), ...(worth ? [again] : []));
      view.failed = error;
      say(`${picture.name}: ${error.message}`);
      return;
    }
  }
  if (!isShown(view) || !picture.answers.has(`${lang} ${model}`)) return;
  view.failed = null;
  showLabels(picture);
  placeOnMap(picture);
}

async function timed(picture, model) {
  const form = new FormData();
  form.append('file', picture.file, picture.name);
  const start = performance.now();
  const {results: [record], serverMs} = await ask(query('classify', {model, top_k: TOP_K, lang}), {method: 'POST', body: form});
  if (!record.ok) throw new Refused(record.error.message, 422);
  return {...record, trip: performance.now() - start, serverMs};
}

/** Say why and until when, and wait; the button ends it at once. */
function waitIn(element, error) {
  return new Promise(resolve => {
    let left = Math.ceil(error.seconds);
    const text = make('p', {className: 'wait is-busy', textContent: t('later', error.message, left)});
    const now = make('button', {type: 'button', textContent: t('now')});
    const timer = setInterval(() => {
      left -= 1;
      if (left > 0) text.textContent = t('later', error.message, left);
      else end();
    }, 1000);
    function end() {
      clearInterval(timer);
      element.replaceChildren(make('p', {className: 'wait is-busy', textContent: t('looking')}));
      resolve();
    }
    now.addEventListener('click', end);
    element.replaceChildren(text, now);
  });
}

/** The labels of all views of a picture that have them, and what the models agree on. */
function showLabels(picture) {
  const answers = picture.views.map(view => picture.answers.get(`${lang} ${view.model}`));
  const isWhole = answers.length > 1 && answers.every(Boolean);
  picture.views.forEach((view, place) => {
    const answer = answers[place];
    if (!answer) return;
    const other = isWhole ? answers[1 - place] : null;
    const rows = answer.topk.map(best => labelRow(best, other, place));
    view.answer.replaceChildren(
      make('ol', {className: 'bars'}, ...rows),
      make('p', {className: 'facts latency', textContent: t('trip', milliseconds(answer.trip), answer.serverMs && milliseconds(answer.serverMs))}),
    );
  });
  picture.verdict.hidden = !isWhole;
  if (isWhole) showVerdict(picture.verdict, answers.map(answer => answer.topk[0].label));
}

function labelRow({label, score}, other, place) {
  const {first, others} = synonyms(label);
  const name = make('span', {className: 'name', title: label}, first);
  if (other) {
    const twin = other.topk.find(best => same(best.label, label));
    const points = twin && Math.round(100 * (score - twin.score));
    if (!twin) name.append(' ', make('small', {className: 'only', textContent: t('only')}));
    else if (place === 1 && points) {
      name.append(' ', make('small', {className: 'more', title: t('points'), textContent: `${points > 0 ? '+' : '−'}${Math.abs(points)}`}));
    }
  } else if (others) {
    name.append(' ', make('small', {textContent: others}));
  }
  const bar = make('i', {ariaHidden: 'true'});
  bar.style.setProperty('--share', `${100 * score}%`);
  return make('li', {}, name, make('span', {className: 'percent', textContent: percent(score)}), bar);
}

/** Whether two labels name one thing: models may list its synonyms in other orders. */
function same(one, other) {
  const words = label => label.toLowerCase().split(/\s*[,，、;；]\s*/);
  return words(one).some(word => words(other).includes(word));
}

function showVerdict(element, labels) {
  const agree = same(...labels);
  const [one, other] = labels.map(label => make('b', {textContent: synonyms(label).first}));
  element.className = `verdict ${agree ? 'agree' : 'differ'}`;
  const text = agree ? [t('both'), one, t('bothEnd')] : [t('differ'), one, t('differMiddle'), other];
  element.replaceChildren(icon(agree ? 'agree' : 'differ'), make('span', {}, ...text));
}

// ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Get the maps of a view, once, and draw what is chosen of them. */
async function look(view) {
  const {picture, model, canvas, looking} = view;
  if (!isLooking()) {
    canvas.hidden = looking.hidden = true;
    return;
  }
  if (!hasAttention(model) || !picture.image) {
    looking.hidden = !picture.image;
    looking.textContent = `${model} ${t('noAttention')}.`;
    return;
  }
  if (!picture.maps.get(model)) {
    looking.hidden = false;
    looking.textContent = t('asking');
    try {
      const answer = await patiently(2, () => (isShown(view) && isLooking() ? explained(picture, model) : Promise.resolve(null)),
        async error => {
          looking.textContent = t('later', error.message, error.seconds);
          await sleep(error.seconds);
        });
      if (answer === null) return;
      picture.maps.set(model, answer);
    } catch (error) {
      looking.textContent = error.message;
      looking.hidden = Boolean(view.failed); // said above already
      return;
    }
    showLooks();
  }
  looking.hidden = true;
  if (isLooking()) draw(view); // it may have been turned off meanwhile
}

/** The answer of POST /explain with each layer's maps: `at[layer][head]` 0 to 255 on the grid, head 0 the mean. */
function explained(picture, model) {
  if (!picture.asked) picture.asked = new Map();
  if (!picture.asked.has(model)) {
    const options = {method: 'POST', body: picture.file, headers: {'Content-Type': 'application/octet-stream'}};
    const asked = ask(query('explain', {model, lang}), options).then(answer => {
      const bytes = bytesOf(answer.maps);
      const cells = answer.grid[0] * answer.grid[1];
      let map = 0;
      const at = answer.heads.map(count => {
        const heads = [];
        const mean = new Float32Array(cells);
        for (let head = 0; head < count; head += 1, map += 1) {
          const values = bytes.subarray(map * cells, (map + 1) * cells);
          const [low, high] = answer.ranges[map];
          for (let cell = 0; cell < cells; cell += 1) mean[cell] += low + values[cell] / 255 * (high - low);
          heads.push(values);
        }
        return [stretched(mean), ...heads];
      });
      return {...answer, at};
    }).finally(() => picture.asked.delete(model));
    picture.asked.set(model, asked);
  }
  return picture.asked.get(model);
}

function stretched(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return Uint8Array.from(values, value => 255 * (value - low) / (high - low || 1));
}

const COLOURS = (() => {
  const colours = RAMP.map(hex => [1, 3, 5].map(start => parseInt(hex.slice(start, start + 2), 16)));
  return Array.from({length: 256}, (_, value) => {
    const place = value / 255 * (colours.length - 1);
    const low = Math.min(Math.floor(place), colours.length - 2);
    const rgb = colours[low].map((from, channel) => from + (place - low) * (colours[low + 1][channel] - from));
    return [...rgb, 255 * (0.25 + 0.75 * (value / 255) ** 0.9)];
  });
})();

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function draw({picture, model, canvas}) {
  const maps = picture.maps.get(model);
  const {layer, head} = lookOf(model, maps);
  const values = maps.at[layer][Math.min(head, maps.at[layer].length - 1)];
  const [rows, columns] = maps.grid;
  // two cells more at each end: what lies beyond the outermost centres has their values
  const colours = new ImageData(columns + 4, rows + 4);
  for (let cell = 0; cell < colours.width * colours.height; cell += 1) {
    const row = clamp(Math.floor(cell / colours.width) - 2, 0, rows - 1);
    const column = clamp(cell % colours.width - 2, 0, columns - 1);
    colours.data.set(COLOURS[values[row * columns + column]], 4 * cell);
  }
  const small = make('canvas', {width: colours.width, height: colours.height});
  small.getContext('2d').putImageData(colours, 0, 0);

  const scale = Math.min(1, DRAWN_SIDE / Math.max(...maps.size));
  [canvas.width, canvas.height] = maps.size.map(side => Math.max(1, Math.round(side * scale)));
  const [left, top, right, bottom] = maps.region.map(edge => edge * scale);
  const [width, height] = [right - left, bottom - top];
  const [x0, y0, x1, y1] = maps.seen; // shares of the region
  const seen = [left + x0 * width, top + y0 * height, (x1 - x0) * width, (y1 - y0) * height];
  const pen = canvas.getContext('2d');
  pen.fillStyle = 'rgb(0 0 0 / .55)';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.clearRect(...seen);
  pen.beginPath();
  pen.rect(...seen);
  pen.clip();
  pen.globalAlpha = strength;
  pen.imageSmoothingQuality = 'high';
  const [across, down] = [width / columns, height / rows];
  pen.drawImage(small, left - 2 * across, top - 2 * down, width + 4 * across, height + 4 * down);
  canvas.hidden = false;
}

/** What is shown of a model: of a ViT its last layer at first, of a Perceiver where the latents look. */
function lookOf(model, maps) {
  if (!looks.has(model)) looks.set(model, {layer: maps.kind === 'vit' ? maps.layers - 1 : 0, head: 0});
  return looks.get(model);
}

/** The sliders: for each model a layer and a head, and one strength for all. */
function showLooks() {
  byId('looks').hidden = !isLooking();
  if (!isLooking()) return;
  const focused = document.activeElement?.id;
  const gap = chosen().length > 1 ? make('b', {className: 'gap', textContent: '\u00a0'}) : null;
  const shared = make('div', {className: 'look'}, gap, strengthSlider(), ramp());
  byId('looks').replaceChildren(...chosen().map(lookControls), shared);
  if (focused) byId(focused)?.focus();
}

function lookControls(model, place) {
  const box = make('div', {className: 'look'});
  if (chosen().length > 1) box.append(make('b', {textContent: model, title: model}));
  const maps = pictures.map(picture => picture.maps.get(model)).find(Boolean);
  if (!maps) {
    box.append(make('small', {textContent: hasAttention(model) ? t('waitingFor') : `${model} ${t('noAttention')}.`}));
    return box;
  }
  const chosenLook = lookOf(model, maps);
  const redraw = () => {
    for (const picture of pictures) {
      for (const view of picture.views) if (view.model === model && picture.maps.has(model)) draw(view);
    }
  };
  const layerName = value => {
    if (maps.kind === 'vit') return t('of', value + 1, maps.layers);
    return value ? t('self', value, maps.layers - 1) : t('cross');
  };
  const count = () => maps.at[chosenLook.layer].length - 1;
  const headName = value => (value ? t('of', value, count()) : maps.heads_shown === 'mean' ? t('onlyMean') : t('mean', count()));
  const head = slider(`head-${place}`, t('head'), t('headOf', model), 0, count() > 1 ? count() : 0, chosenLook.head, headName, value => {
    chosenLook.head = value;
    redraw();
  });
  const layer = slider(`layer-${place}`, t('layer'), t('layerOf', model), 0, maps.layers - 1, chosenLook.layer, layerName, value => {
    chosenLook.layer = value;
    const most = count() > 1 ? count() : 0;
    chosenLook.head = Math.min(chosenLook.head, most);
    head.set(most, chosenLook.head);
    redraw();
  });
  box.append(layer.element, head.element);
  return box;
}

function slider(id, text, name, low, high, value, describe, onInput) {
  const input = make('input', {type: 'range', id, min: low, max: high, step: 1, value, ariaLabel: name});
  const output = make('output', {});
  output.htmlFor.add(id);
  const show = () => {
    output.textContent = describe(Number(input.value));
    input.setAttribute('aria-valuetext', output.textContent);
    input.disabled = Number(input.min) === Number(input.max);
  };
  input.addEventListener('input', () => {
    onInput(Number(input.value));
    show();
  });
  show();
  const set = (most, now) => {
    input.max = most;
    input.value = now;
    show();
  };
  return {element: make('div', {className: 'slide'}, make('label', {htmlFor: id, textContent: text}), input, output), set};
}

function strengthSlider() {
  return slider('strength', t('strength'), t('strength'), 0, 100, Math.round(100 * strength), value => `${value} %`, value => {
    strength = value / 100;
    for (const picture of pictures) for (const view of picture.views) if (picture.maps.has(view.model)) draw(view);
  }).element;
}

function ramp() {
  return make('div', {className: 'ramp'}, make('span', {textContent: t('less')}), make('i', {}), make('span', {textContent: t('most')}));
}

// ── map ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Get the embeddings of a picture that has labels, and place it. */
async function placeOnMap(picture) {
  for (const model of chosen()) {
    if (picture.embeddings.has(model)) continue;
    picture.embeddings.set(model, null); // on its way
    try {
      const vector = await patiently(3, () => (picture.isGone ? Promise.resolve(null) : embedded(picture, model)),
        error => sleep(error.seconds));
      picture.embeddings.set(model, vector);
    } catch {
      picture.embeddings.delete(model); // its card says what is wrong with it, or it is too large for base64
    }
  }
  showMap();
}

/** A vector of length 1. */
async function embedded(picture, model) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(picture.file);
  });
  const body = JSON.stringify({model, input: [url], encoding_format: 'base64'});
  const {data: [{embedding}]} = await ask('v1/embeddings', {method: 'POST', body, headers: {'Content-Type': 'application/json'}});
  const view = new DataView(bytesOf(embedding).buffer);
  const vector = Float64Array.from({length: view.byteLength / 4}, (_, i) => view.getFloat32(4 * i, true));
  const norm = Math.hypot(...vector) || 1;
  return vector.map(value => value / norm);
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

/**
 * The two main directions of vectors: [[x, y], …]. They are eigenvectors of the centred Gram matrix (n × n), found by
 * power iteration; `before` are the places that some had, so that a direction does not flip when a vector is added.
 */
export function mainDirections(vectors, before = []) {
  const n = vectors.length;
  const gram = vectors.map(one => vectors.map(other => dot(one, other)));
  const rows = gram.map(row => row.reduce((sum, value) => sum + value, 0) / n);
  const all = rows.reduce((sum, value) => sum + value, 0) / n;
  const centred = gram.map((row, i) => row.map((value, j) => value - rows[i] - rows[j] + all));
  const places = vectors.map(() => [0, 0]);
  const first = Math.max(...centred.map((row, i) => row[i]));
  for (const axis of [0, 1]) {
    let vector = centred.map((_, i) => Math.cos(1 + 2 * i) + 1e-3 * i); // not at right angles to anything
    let length = 0;
    for (let step = 0; step < 200; step += 1) {
      const next = centred.map(row => dot(row, vector));
      length = Math.hypot(...next);
      if (length < 1e-9 * first || first < 1e-12) break;
      const unit = next.map(value => value / length);
      const change = Math.abs(1 - Math.abs(dot(unit, vector)));
      vector = unit;
      if (step && change < 1e-12) break;
    }
    if (length < 1e-9 * first || first < 1e-12) break; // one picture, or all of them equal
    const seen = before.reduce((sum, place, i) => sum + (place ? place[axis] * vector[i] : 0), 0);
    const sign = seen < 0 ? -1 : 1;
    vector.forEach((value, i) => { places[i][axis] = sign * value * Math.sqrt(length); });
    for (let i = 0; i < n; i += 1) for (let j = 0; j < n; j += 1) centred[i][j] -= length * vector[i] * vector[j];
  }
  return places;
}

const planes = new Map(); // model → {element, field, points: picture → {button, name, place}}

function showMap() {
  const shown = chosen().filter(model => pictures.some(picture => picture.embeddings.get(model)));
  byId('maps').hidden = shown.length === 0;
  const area = document.querySelector('.planes');
  area.classList.toggle('is-crowded', pictures.length > CROWD);
  for (const model of shown) {
    if (planes.has(model)) continue;
    const field = make('div');
    const element = make('div', {className: 'plane', role: 'group', ariaLabel: model}, make('b', {textContent: model}), field);
    planes.set(model, {element, field, points: new Map()});
  }
  const elements = shown.map(model => planes.get(model).element);
  const isThere = elements.length === area.childElementCount && elements.every((element, i) => element === area.children[i]);
  if (!isThere) area.replaceChildren(...elements);
  for (const model of shown) showPlane(planes.get(model), model);
}

function showPlane({field, points}, model) {
  const here = pictures.filter(picture => picture.embeddings.get(model));
  for (const [picture, {button}] of points) {
    if (here.includes(picture)) continue;
    button.remove();
    points.delete(picture);
  }
  const vectors = here.map(picture => picture.embeddings.get(model));
  const places = mainDirections(vectors, here.map(picture => points.get(picture)?.place));
  const [xs, ys] = [0, 1].map(axis => places.map(place => place[axis]));
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const {width, height} = field.getBoundingClientRect();
  const span = Math.max((right - left) / (width || 1), (bottom - top) / (height || 1)) || 1; // one scale for both axes
  here.forEach((picture, i) => {
    if (!points.has(picture)) points.set(picture, makePoint(picture, field));
    const point = points.get(picture);
    point.place = places[i];
    const x = 0.5 + (places[i][0] - (left + right) / 2) / span / (width || 1);
    const y = 0.5 + (places[i][1] - (top + bottom) / 2) / span / (height || 1);
    point.button.style.left = `${100 * x}%`;
    point.button.style.top = `${100 * y}%`;
    point.button.classList.toggle('at-left', x < 0.2);
    point.button.classList.toggle('at-right', x > 0.8);
    const cosines = vectors.map((vector, j) => (j === i ? -2 : dot(vector, vectors[i])));
    const nearest = cosines.indexOf(Math.max(...cosines));
    const more = here.length > 1 ? ` · ${t('alike', here[nearest].name, cosines[nearest].toFixed(2))}` : '';
    point.name.textContent = picture.name + more;
  });
}

function makePoint(picture, field) {
  const canvas = make('canvas', {width: 160, height: 160, ariaHidden: 'true'});
  if (picture.image) {
    const [width, height] = [picture.image.naturalWidth, picture.image.naturalHeight];
    const side = Math.min(width, height);
    canvas.getContext('2d').drawImage(picture.image, (width - side) / 2, (height - side) / 2, side, side, 0, 0, 160, 160);
  }
  const name = make('span');
  const button = make('button', {type: 'button', className: 'point'}, canvas, name);
  button.addEventListener('click', () => {
    picture.card.scrollIntoView({behavior: 'smooth', block: 'center'});
    picture.card.focus({preventScroll: true});
    picture.card.classList.remove('is-found');
    void picture.card.offsetWidth; // so that the animation begins again
    picture.card.classList.add('is-found');
  });
  field.append(button);
  return {button, name, place: null};
}

// ── code ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

const inShell = text => `'${text.replaceAll("'", "'\\''")}'`;
const inPython = text => JSON.stringify(text);

const CODE = {
  curl(model, needsKey) {
    const url = new URL(query('classify', {model, top_k: TOP_K, lang}), document.baseURI);
    const key = needsKey ? ' -H "Authorization: Bearer $OPSIN_API_KEY"' : '';
    return `curl${key} -F file=@photo.jpg ${inShell(url.href)}\n`;
  },
  hub(model, needsKey) {
    const url = new URL(`models/${model.split('/').map(encodeURIComponent).join('/')}`, document.baseURI);
    return `${needsKey ? 'import os\n\n' : ''}from huggingface_hub import InferenceClient\n\n`
      + `client = InferenceClient(${inPython(url.href)}${needsKey ? ', token=os.environ["OPSIN_API_KEY"]' : ''})\n`
      + `for best in client.image_classification("photo.jpg", top_k=${TOP_K}):\n`
      + '    print(f"{best.score:.1%}  {best.label}")\n';
  },
  requests(model, needsKey) {
    const url = new URL('classify', document.baseURI);
    const key = needsKey ? '        headers={"Authorization": f"Bearer {os.environ[\'OPSIN_API_KEY\']}"},\n' : '';
    return `${needsKey ? 'import os\n\n' : ''}import requests\n\n`
      + 'with open("photo.jpg", "rb") as photo:\n    answer = requests.post(\n'
      + `        ${inPython(url.href)},\n${key}`
      + `        params={"model": ${inPython(model)}, "top_k": ${TOP_K}, "lang": "${lang}"},\n`
      + '        files={"file": photo},\n    )\nanswer.raise_for_status()\n'
      + 'for best in answer.json()["results"][0]["topk"]:\n    print(f"{best[\'score\']:.1%}  {best[\'label\']}")\n';
  },
};

let codeKind = 'curl';

function showCode() {
  for (const kind of Object.keys(CODE)) {
    const tab = byId(`tab-${kind}`);
    tab.setAttribute('aria-selected', kind === codeKind);
    tab.tabIndex = kind === codeKind ? 0 : -1;
  }
  byId('code').setAttribute('aria-labelledby', `tab-${codeKind}`);
  const model = chosen()[0] ?? 'opsin/vit-tiny';
  byId('code').firstElementChild.textContent = CODE[codeKind](model, Boolean(kept.get('sessionStorage', 'opsin-key')));
}

async function copyCode() {
  const code = byId('code').firstElementChild;
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch { // a page of http:// elsewhere than on localhost has no clipboard
    getSelection().selectAllChildren(code);
    document.execCommand('copy');
  }
  byId('copy').textContent = t('copied');
  byId('copy').classList.add('is-done');
  say(t('copied'));
  setTimeout(() => {
    byId('copy').textContent = t('copy');
    byId('copy').classList.remove('is-done');
  }, 2000);
}

// ── ways in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const counts = {pasted: 0, snapshot: 0};

function paste(event) {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length) return;
  event.preventDefault();
  add(files, file => {
    counts.pasted += 1; // browsers call each of them image.png
    return file.name && file.name !== 'image.png' ? file.name : t('pasted', counts.pasted, file.type.split('/')[1] || 'png');
  });
}

function watchDrops() {
  let depth = 0; // dragenter comes before the dragleave of what was left
  const carriesFiles = event => event.dataTransfer?.types.includes('Files');
  const show = change => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle('is-dragging', depth > 0);
  };
  addEventListener('dragenter', event => carriesFiles(event) && show(1));
  addEventListener('dragleave', event => carriesFiles(event) && show(-1));
  addEventListener('dragover', event => carriesFiles(event) && event.preventDefault());
  addEventListener('drop', event => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    show(-depth);
    add([...event.dataTransfer.files]);
  });
}

function watchCamera() {
  const booth = byId('booth');
  const [video, problem] = [booth.querySelector('video'), booth.querySelector('.problem')];
  const [snap, done] = booth.querySelectorAll('button');
  let stream = null;
  byId('camera').addEventListener('click', async () => {
    problem.hidden = true;
    snap.disabled = true;
    booth.showModal();
    try {
      if (!navigator.mediaDevices) throw new Error(t('noCamera'));
      stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment', width: {ideal: 1280}}});
      if (!booth.open) return stop();
      video.srcObject = stream;
      await video.play();
      snap.disabled = false;
      snap.focus();
    } catch (error) {
      problem.textContent = navigator.mediaDevices ? t('refusedCamera') + error.message : error.message;
      problem.hidden = false;
    }
  });
  snap.addEventListener('click', () => {
    const canvas = make('canvas', {width: video.videoWidth, height: video.videoHeight});
    canvas.getContext('2d').drawImage(video, 0, 0);
    canvas.toBlob(blob => {
      counts.snapshot += 1;
      add([new File([blob], t('snapshot', counts.snapshot), {type: 'image/jpeg'})]);
    }, 'image/jpeg', 0.92);
    video.classList.remove('is-snapped');
    void video.offsetWidth;
    video.classList.add('is-snapped');
  });
  function stop() {
    stream?.getTracks().forEach(track => track.stop());
    stream = video.srcObject = null;
  }
  done.addEventListener('click', () => booth.close());
  booth.addEventListener('close', stop);
}

// ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────

function showWords() {
  document.documentElement.lang = lang;
  for (const element of document.querySelectorAll('[data-t]')) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll('[data-label]')) element.setAttribute('aria-label', t(element.dataset.label));
  const other = lang === 'zh' ? 'en' : 'zh';
  byId('language').textContent = other === 'zh' ? '中文' : 'English';
  byId('language').lang = other;
}

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  byId('theme').setAttribute('aria-pressed', isDark());
}

function listen() {
  byId('language').addEventListener('click', () => {
    lang = lang === 'zh' ? 'en' : 'zh';
    kept.set('localStorage', 'opsin-lang', lang);
    showWords();
    listOthers();
    showModels();
  });
  byId('theme').addEventListener('click', () => {
    const theme = isDark() ? 'light' : 'dark';
    kept.set('localStorage', 'opsin-theme', theme);
    showTheme(theme);
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => showTheme());
  byId('model').addEventListener('change', () => {
    listOthers();
    showModels();
  });
  byId('beside').addEventListener('change', showModels);
  byId('attention').addEventListener('change', () => {
    showLooks();
    for (const picture of pictures) picture.views.forEach(look);
  });
  byId('clear').addEventListener('click', () => [...pictures].forEach(remove));
  byId('choose').addEventListener('click', () => byId('files').click());
  byId('files').addEventListener('change', event => {
    add([...event.target.files]);
    event.target.value = ''; // so that the same file may be chosen again
  });
  byId('problem').querySelector('button').addEventListener('click', loadModels);
  byId('key').addEventListener('submit', event => {
    event.preventDefault();
    kept.set('sessionStorage', 'opsin-key', byId('key-field').value.trim());
    byId('key-field').value = '';
    byId('key').hidden = true;
    loadModels();
  });
  const kinds = Object.keys(CODE);
  for (const kind of kinds) {
    byId(`tab-${kind}`).addEventListener('click', () => {
      codeKind = kind;
      showCode();
    });
    byId(`tab-${kind}`).addEventListener('keydown', event => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!step) return;
      codeKind = kinds[(kinds.indexOf(kind) + step + kinds.length) % kinds.length];
      showCode();
      byId(`tab-${codeKind}`).focus();
    });
  }
  byId('copy').addEventListener('click', copyCode);
  addEventListener('paste', paste);
  let resized = 0;
  addEventListener('resize', () => {
    clearTimeout(resized);
    resized = setTimeout(showMap, 150);
  });
  watchDrops();
  watchCamera();
}

showWords();
showTheme(kept.get('localStorage', 'opsin-theme'));
showCode();
listen();
loadModels();
