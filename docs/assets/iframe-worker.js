// Search of a site that is read from files: browsers start no workers there, so a hidden frame takes a worker's place.
// The name makes the theme load its search as it does under the package iframe-worker, which a site would fetch.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    #frame = document.createElement("iframe")
    #loaded

    constructor(url) {
      super()
      this.#frame.hidden = true
      this.#frame.srcdoc = `<script>postMessage = data => frameElement.answer(data)</script><script src="${new URL(url, location)}"></script>`
      this.#frame.answer = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.#loaded = new Promise(resolve => this.#frame.addEventListener("load", resolve, { once: true }))
      document.body.append(this.#frame)
    }

    async postMessage(data) {
      await this.#loaded
      this.#frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }

    terminate() {
      this.#frame.remove()
    }
  }
}
