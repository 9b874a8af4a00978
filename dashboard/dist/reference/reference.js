// The reference: Scalar over /api/openapi.json, and a button that makes a key to try calls out with.
//
// Scalar's own services stay off: no fonts, search, agent, telemetry or proxy of others. The page's policy would not
// let them be reached either.
'use strict'

// Where the dashboard notes which team it shows: {id, role, mode}.
const TEAM = 'paperkey.team'
// The roles that may make keys.
const MAKERS = ['owner', 'admin']

const said = document.getElementById('said')
const button = document.getElementById('use-my-key')
const signIn = document.getElementById('sign-in')

// Colours of Scalar's own that are too faint against what is behind them.
const COLOURS = `
.light-mode {
  --scalar-color-2: #4a4f57;
  --scalar-color-3: #5c636d;
  --scalar-color-green: #006b42;
  --scalar-color-blue: #005fa3;
  --scalar-color-yellow: #7a5800;
  --scalar-color-orange: #9a4a00;
  --scalar-color-red: #b3001e;
  --scalar-color-purple: #5a35a8;
}
.dark-mode {
  --scalar-color-red: #ff7b86;
  --scalar-color-2: #c4c9d0;
  --scalar-color-3: #a3aab4;
}
`

const reference = Scalar.createApiReference('#reference', {
  url: '/api/openapi.json',
  // Calls go to this very address, also where the document names another one: the page may ask nobody else.
  servers: [{ url: location.origin }],
  withDefaultFonts: false,
  telemetry: false,
  agent: { disabled: true },
  mcp: { disabled: true },
  showDeveloperTools: 'never',
  hideClientButton: true,
  hideDarkModeToggle: true,
  persistAuth: false,
  // The samples of the document, in the languages that it has them in, are the ones that are shown.
  hiddenClients: true,
  defaultOpenFirstTag: false,
  documentDownloadType: 'none',
  customCss: COLOURS,
  authentication: { preferredSecurityScheme: 'ApiKey' },
})

// The team that the dashboard shows in this browser; none where nobody is signed in.
function team() {
  try {
    const known = JSON.parse(localStorage.getItem(TEAM))
    return typeof known?.id === 'string' && typeof known.role === 'string' ? known : null
  } catch {
    return null
  }
}

function say(...parts) {
  said.replaceChildren(...parts)
}

function code(text) {
  const element = document.createElement('code')
  element.textContent = text
  return element
}

function offer() {
  const known = team()
  const mayMake = known !== null && MAKERS.includes(known.role.toLowerCase())
  button.hidden = !mayMake
  signIn.hidden = known !== null
}

// Every place where the reference takes a key is given this one.
function use(key) {
  const authentication = {
    preferredSecurityScheme: 'ApiKey',
    securitySchemes: { ApiKey: { token: key } },
  }
  reference.updateConfiguration({ ...reference.getConfiguration(), authentication })
}

let ending = 0

async function useMyKey() {
  const known = team()
  if (known === null) {
    offer()
    return
  }
  button.disabled = true
  say('Making a test key …')
  try {
    const answer = await fetch(`/teams/${encodeURIComponent(known.id)}/api-keys/temporary`, {
      method: 'POST',
      credentials: 'same-origin',
      headers: { 'Content-Type': 'application/json' },
      body: '{}',
    })
    const told = await answer.json()
    if (answer.status === 401 || answer.status === 403) {
      signIn.hidden = false
      say(answer.status === 401 ? 'You are not signed in any more.' : 'Only Owners and Admins of a team make keys.')
    } else if (!answer.ok) {
      say(`${told.message ?? 'That did not work. Try again in a moment.'}${told.requestId ? ` (${told.requestId})` : ''}`)
    } else {
      use(told.key)
      const ends = new Date(told.expiresAt)
      signIn.hidden = true
      say('Calls are made with ', code(`${told.prefix}…`), `, a test key that ends at ${ends.toLocaleTimeString([], { timeStyle: 'short' })}`)
      clearTimeout(ending)
      ending = setTimeout(() => say('The test key has ended. Make another one to go on.'), ends - Date.now())
    }
  } catch {
    say('The server could not be reached.')
  }
  button.disabled = false
}

button.addEventListener('click', useMyKey)
// Signed in, signed out or another team, in another tab.
addEventListener('storage', (event) => {
  if (event.key === TEAM || event.key === null) offer()
})
offer()
