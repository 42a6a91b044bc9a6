// The raters' page. The server decides what is shown and what counts; this file only draws it and sends answers.
(() => {
  "use strict";
  let T, root, toast, state, current = null, retrying = false;

  const el = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false && value != null) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child != null && child !== false));  // strings become text, never HTML
    return node;
  };
  const fill = (text, values) => text.replace(/\{(\w+)\}/g, (all, key) => (key in values ? values[key] : all));
  const say = (text) => { toast.textContent = text || ""; };
  const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

  // Requests are repeated until the server answers: nothing a rater did is lost to a short outage.
  async function api(path, body) {
    for (let wait = 1; ; wait = Math.min(2 * wait, 15)) {
      try {
        const options = body === undefined ? {} : {
          method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
        const answer = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
        if (answer.status < 500) {
          if (retrying) { retrying = false; say(""); }
          return { status: answer.status, data: await answer.json() };
        }
      } catch (error) { /* offline, or the server is restarting */ }
      retrying = true;
      say(T ? T.error.retry : "…");
      await pause(wait);
    }
  }

  function show(...nodes) {
    current = null;
    root.replaceChildren(...nodes, toast);
    const heading = root.querySelector("h1");
    if (heading) { heading.tabIndex = -1; heading.focus({ preventScroll: true }); }
    window.scrollTo(0, 0);
  }
  const card = (heading, ...nodes) => el("section", { class: "card" }, el("h1", {}, heading), ...nodes);
  const go = (text, onclick, extra = {}) => el("button", { type: "button", class: "go", onclick, ...extra }, text);

  const screens = {
    consent() {
      const start = go(T.consent.start, async () => {
        start.disabled = true;
        say("");
        follow((await api("api/consent", { agree: true, consent: state.consent })).data, true);
      }, { disabled: true });
      const agree = el("input", { type: "checkbox", onchange: () => { start.disabled = !agree.checked; } });
      const values = { trials: state.trials };
      show(card(T.consent.heading, ...T.consent.paragraphs.map((text) => el("p", {}, fill(text, values))),
        state.contact ? el("p", {}, fill(T.consent.contact, { contact: state.contact })) : null,
        el("label", { class: "check" }, agree, el("span", {}, T.consent.agree)), el("div", { class: "row" }, start)));
    },
    done() {
      const copied = el("span", { role: "status" });
      const nodes = [el("p", {}, T.done.text)];
      if (state.code) {
        const copy = async () => {
          try { await navigator.clipboard.writeText(state.code); copied.textContent = T.done.copied; } catch (error) { /* selectable by hand */ }
        };
        nodes.push(el("p", {}, T.done.code), el("p", {}, el("span", { class: "code" }, state.code)),
          el("div", { class: "row" }, el("button", { type: "button", onclick: copy }, T.done.copy), copied));
      }
      if (state.link) nodes.push(el("div", { class: "row" }, el("a", { class: "button go", href: state.link, rel: "noreferrer" }, T.done.link)));
      show(card(T.done.heading, ...nodes));
    },
    trial() { drawTrial(); },
  };
  for (const name of ["full", "withdrawn", "preview", "unknown"]) {
    screens[name] = () => show(card(T[name].heading, el("p", {}, T[name].text)));
  }

  // Where the server says we stand; after a vote there may be a break, after the consent the instructions.
  function follow(next, fresh = false) {
    if (!next.stage) {
      const retry = go(T.error.reload, () => location.reload());
      return show(card(T.error.heading, el("p", {}, T.error[next.error] || T.error.malformed), el("div", { class: "row" }, retry)));
    }
    state = next;
    if (state.stage === "trial" && fresh && state.done === 0) return instructions(() => screens.trial());
    if (state.stage === "trial" && state.break) return restBreak();
    screens[state.stage]();
  }

  function picture(kind) {
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", "0 0 92 60");
    svg.setAttribute("aria-hidden", "true");
    const add = (tag, values) => {
      const node = document.createElementNS(ns, tag);
      for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
      svg.append(node);
    };
    if (kind === "square") add("rect", { x: 30, y: 14, width: 32, height: 32, fill: "#2850c8" });
    else add("circle", { cx: 46, cy: 30, r: 18, fill: "#d22828" });
    if (kind === "torn") {
      for (let i = 0; i < 26; i++) {
        add("rect", { x: 22 + (i * 37) % 48, y: 8 + (i * 23) % 42, width: 6, height: 3, fill: i % 2 ? "#808080" : "#e8b0a0" });
      }
    }
    return svg;
  }

  function instructions(back) {
    const I = T.instructions;
    const example = (first, second, text) => el("div", { class: "example" }, picture(first), picture(second), el("span", {}, text));
    show(card(I.heading, ...I.paragraphs.map((text) => el("p", {}, text)),
      el("h2", {}, I.quality_heading), el("p", {}, I.quality), example("ball", "torn", I.quality_example),
      el("h2", {}, I.alignment_heading), el("p", {}, I.alignment), example("ball", "square", I.alignment_example),
      state.practice && state.trial && state.trial.practice ? el("p", {}, fill(I.practice, { practice: state.practice })) : null,
      el("div", { class: "row" }, go(I.go, back))));
  }

  const restBreak = () => show(card(T.break.heading, progress(), el("p", {}, fill(T.break.text, state)),
    el("div", { class: "row" }, go(T.break.go, () => screens.trial()))));

  function withdraw() {
    const W = T.withdraw;
    show(card(W.heading, el("p", {}, W.text), el("div", { class: "row" }, go(W.back, () => screens.trial()),
      el("button", { type: "button", onclick: async () => follow((await api("api/withdraw", {})).data) }, W.sure))));
  }

  function feedback(rights, next) {
    const lines = Object.entries(rights).filter(([, right]) => right.expected).map(([question, right]) =>
      el("p", {}, el("strong", {}, T.trial.question[question]), " ", right.expected === right.given ? T.feedback.right
        : fill(T.feedback.wrong, { answer: T.trial[right.expected] })));
    show(card(T.feedback.heading, ...lines, el("div", { class: "row" }, go(T.feedback.next, () => follow(next)))));
  }

  const progress = () => el("progress", { max: state.total, value: state.done, "aria-label": fill(T.trial.progress, state) });

  function drawTrial() {
    const trial = state.trial, X = T.trial;
    const figures = {}, videos = {}, radios = {};
    for (const side of ["left", "right"]) {
      videos[side] = el("video", { playsinline: true, muted: true, preload: "auto", disablepictureinpicture: true,
        disableremoteplayback: true, "aria-label": X[side], width: trial.width, height: trial.height });
      videos[side].muted = true;
      figures[side] = el("figure", {}, videos[side], el("figcaption", {}, X[side]));
    }
    const both = [videos.left, videos.right];
    const run = { unlocked: 0, replays: 0, slow: false, sending: false, chosen: {}, seconds: {}, ready: false };
    const button = (text, key, onclick, extra = {}) =>
      el("button", { type: "button", onclick, "aria-keyshortcuts": key, ...extra }, text, " ", el("kbd", { "aria-hidden": "true" }, key));

    const playing = () => both.some((video) => !video.paused && !video.ended);
    const play = async () => {
      if (!run.ready) return;
      if (both.every((video) => video.ended)) both.forEach((video) => { video.currentTime = 0; });
      try { await Promise.all(both.map((video) => (video.ended ? null : video.play()))); } catch (error) { status.textContent = X.press_play; }
      label();
    };
    const toggle = () => { if (playing()) { both.forEach((video) => video.pause()); label(); } else play(); };
    const replay = () => { run.replays += 1; both.forEach((video) => { video.currentTime = 0; }); play(); };
    const slower = () => {
      run.half = !run.half;
      run.slow = true;
      both.forEach((video) => { video.playbackRate = run.half ? 0.5 : 1; });
      slow.setAttribute("aria-pressed", String(run.half));
    };
    const enlarge = (side) => {
      const video = videos[side];
      if (document.fullscreenElement) document.exitFullscreen();
      else if (video.requestFullscreen) video.requestFullscreen();
      else if (video.webkitEnterFullscreen) video.webkitEnterFullscreen();
    };
    const label = () => { toggler.firstChild.textContent = playing() ? X.pause : X.play; };
    const toggler = button(X.play, "Space", toggle);
    const slow = button(X.slow, "S", slower, { "aria-pressed": "false" });
    const status = el("p", { class: "status", role: "status" }, T.loading);
    const submit = go(X.submit, () => send(), { disabled: true, "aria-keyshortcuts": "Enter" });
    submit.append(" ", el("kbd", { "aria-hidden": "true" }, "Enter"));

    const keys = [["1", "2", "3"], ["9", "0", "8"]];
    const shortcuts = {};
    const sets = trial.questions.map((question, number) => {
      const choices = trial.ties ? ["left", "right", "tie"] : ["left", "right"];
      radios[question] = choices.map((choice, place) => {
        const input = el("input", { type: "radio", name: `q${number}`, value: choice, disabled: true, "aria-keyshortcuts": keys[number][place],
          onchange: () => choose(question, choice) });
        shortcuts[keys[number][place]] = () => { if (!input.disabled) { input.checked = true; choose(question, choice); } };
        return input;
      });
      return el("fieldset", {}, el("legend", {}, X.question[question]), el("div", { class: "choices" },
        ...radios[question].map((input, place) => el("label", {}, input,
          el("span", {}, X[input.value], " ", el("kbd", { "aria-hidden": "true" }, keys[number][place]))))));
    });

    function choose(question, choice) {
      run.chosen[question] = choice;
      run.seconds[question] = (performance.now() - run.unlocked) / 1000;
      submit.disabled = Object.keys(run.chosen).length < trial.questions.length;
    }
    const share = (video) => {
      let seen = 0;
      for (let i = 0; i < video.played.length; i++) seen += video.played.end(i) - video.played.start(i);
      return video.duration ? Math.min(1, seen / video.duration) : 0;
    };
    const endOf = { left: 0, right: 0 };
    const watched = (side) => (endOf[side] ? Math.max(endOf[side], share(videos[side])) : share(videos[side]));
    function look() {
      if (current !== run) return;
      if (run.unlocked) return;
      const least = Math.min(watched("left"), watched("right"));
      if (least >= trial.min_watched) {
        run.unlocked = performance.now();
        Object.values(radios).flat().forEach((input) => { input.disabled = false; });
        status.textContent = X.watched;
      } else if (run.ready && playing()) {
        const percent = 10 * Math.floor(10 * least);  // in tens, so that a screen reader is not flooded
        const text = fill(X.watch, { percent });
        if (status.textContent !== text) status.textContent = text;
      }
    }
    for (const side of ["left", "right"]) {
      const video = videos[side];
      video.addEventListener("timeupdate", () => {
        look();
        const gap = videos.right.currentTime - videos.left.currentTime;
        if (playing() && !both.some((one) => one.ended) && Math.abs(gap) > trial.frame) videos.right.currentTime = videos.left.currentTime;
      });
      video.addEventListener("ended", () => {
        endOf[side] = share(video) > 0.9 ? 1 : share(video);  // the last frame's time is not counted as played
        look();
        if (both.every((one) => one.ended)) play();
      });
      video.addEventListener("dblclick", () => enlarge(side));
    }

    async function send() {
      if (submit.disabled || run.sending) return;
      run.sending = submit.disabled = true;
      const body = { answers: run.chosen, seconds: run.seconds, replays: run.replays, slow: run.slow,
        watched: { left: watched("left"), right: watched("right") } };
      const { status: code, data } = await api(`api/trial/${trial.token}/vote`, body);
      if (current !== run) return;
      release();
      if (code === 200) {
        say("");
        if (data.feedback) feedback(data.feedback, data.next);
        else follow(data.next);
      } else {
        say(T.error[data.error] || T.error.malformed);
        follow((await api("api/state", {})).data);
      }
    }
    const urls = [];
    const release = () => { both.forEach((video) => video.pause()); urls.forEach((url) => URL.revokeObjectURL(url)); };

    const bar = el("div", { class: "bar" },
      trial.practice ? el("span", { class: "tag", "aria-hidden": "true" }, X.practice) : null,
      el("div", { class: "grow" }, progress()),
      el("span", { class: "count", "aria-hidden": "true" }, fill(X.progress, state)),
      el("button", { type: "button", onclick: () => { release(); instructions(() => screens.trial()); } }, X.help),
      el("button", { type: "button", onclick: () => { release(); withdraw(); } }, X.withdraw));
    const legend = [["Space", `${X.play}/${X.pause}`], ["R", X.restart], ["S", X.slow], ["F", X.enlarge_left], ["J", X.enlarge_right]];
    // The heading is for screen readers: it takes the focus, so that they say which comparison has come.
    const heading = trial.practice ? X.practice : fill(X.heading, { number: state.done + 1, total: state.total });
    show(el("section", { "aria-label": T.title }, el("h1", { class: "heard" }, heading), bar,
      el("p", { class: "prompt" }, el("span", {}, X.prompt), trial.prompt),
      el("div", { class: "clips" }, figures.left, figures.right),
      el("div", { class: "controls" }, toggler, button(X.restart, "R", replay), slow,
        button(X.enlarge_left, "F", () => enlarge("left")), button(X.enlarge_right, "J", () => enlarge("right"))),
      status, el("div", { class: "questions" }, ...sets), el("div", { class: "submit" }, submit),
      el("p", { class: "legend" }, `${X.keys}: `, ...legend.flatMap(([key, text], i) => [i ? " · " : "", el("kbd", {}, key), ` ${text}`]))));
    current = run;
    run.keys = { ...shortcuts, " ": toggle, r: replay, s: slower, f: () => enlarge("left"), j: () => enlarge("right"), Enter: send };

    (async () => {
      for (let wait = 1; current === run; wait = Math.min(2 * wait, 15)) {
        try {
          const blobs = await Promise.all(["left", "right"].map(async (side) => {
            const answer = await fetch(trial[side], { credentials: "same-origin" });
            if (answer.status === 404 || answer.status === 403) { run.gone = true; throw new Error("gone"); }
            if (!answer.ok) throw new Error(String(answer.status));
            return answer.blob();
          }));
          if (current !== run) return;
          blobs.forEach((blob, i) => { urls.push(URL.createObjectURL(blob)); both[i].src = urls[i]; });
          await Promise.all(both.map((video) => new Promise((done) => {
            if (video.readyState >= 4) done(); else video.addEventListener("canplaythrough", done, { once: true });
          })));
          run.ready = true;
          status.textContent = fill(X.watch, { percent: 0 });
          return void play();
        } catch (error) {
          if (run.gone) { say(T.error.expired); return void follow((await api("api/state", {})).data); }
          say(T.error.retry);
          await pause(wait);
          say("");
        }
      }
    })();
    const timer = setInterval(() => { if (current === run) look(); else clearInterval(timer); }, 250);
  }

  document.addEventListener("keydown", (event) => {
    if (!current || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    if (target instanceof HTMLInputElement && target.type !== "radio") return;
    if (target instanceof HTMLTextAreaElement) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (target instanceof HTMLButtonElement && (key === " " || key === "Enter")) return;  // the button's own press
    const action = current.keys[key];
    if (action) { event.preventDefault(); action(); }
  });

  async function begin() {
    T = (await api("api/texts")).data;
    document.documentElement.lang = T.lang;
    document.title = T.title;
    const params = Object.fromEntries(new URLSearchParams(location.search));
    follow((await api("api/enter", { params })).data);
  }

  const wait = setInterval(() => {
    root = document.getElementById("study");
    if (!root) return;
    clearInterval(wait);
    toast = el("div", { class: "toast", role: "alert" });
    begin();
  }, 50);
})();
